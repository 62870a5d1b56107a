"""Logits for the wanted rows only."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import (
    add_input,
    bind,
    calls,
    fake,
    insert_call,
    is_call,
    refresh_val,
    refuse,
)

aten = torch.ops.aten
LINEAR = torch.ops.inlay.linear.default
ATTENTIONS = (torch.ops.inlay.attention.default, torch.ops.inlay.paged_attention.default)


def gather_last_logits(gm: GraphModule) -> int:
    """Index the hidden states before the LM head with a new step input.

        logits = inlay.linear(hidden, weight)                 # [1, T, vocab]
    ->
        rows = index_select(hidden, 1, logits_indices)        # [1, R, hidden_size]
        logits = inlay.linear(rows, weight)                   # [1, R, vocab]

    Only token-wise ops may stand between the LM head and the output (soft-cap, scale, cast). An
    encoder, which has no LM head, gives all its hidden states.
    """
    if is_encoder(gm):
        return 0
    chain = output_chain(gm)
    if not chain:
        return 0
    head = chain[0]
    hidden = head.args[0]
    assert isinstance(hidden, Node)
    if fake(hidden).dim() != 3:
        refuse(gm, head, f"hidden states have {fake(hidden).dim()} dimensions, not [1, T, size]")
        return 0
    indices = add_input(gm, "logits_indices", ["num_logits"], torch.int64)
    rows = insert_call(gm.graph, head, aten.index_select.default, hidden, 1, indices)
    head.replace_input_with(hidden, rows)
    for node in chain:
        refresh_val(node)
    return 1


def is_encoder(gm: GraphModule) -> bool:
    """Whether tokens see those after them."""
    return any(not bind(node)["causal"] for node in calls(gm, *ATTENTIONS))


def output_chain(gm: GraphModule) -> list[Node]:
    """From the LM head's linear layer to the output, token-wise all the way; else empty."""
    output = next(iter(gm.graph.find_nodes(op="output")))
    if len(output.all_input_nodes) != 1:
        refuse(gm, output, f"the graph has {len(output.all_input_nodes)} outputs, not one")
        return []
    node = output.all_input_nodes[0]
    chain = [node]
    while not is_call(node, LINEAR):
        source = _token_wise_source(node)
        if source is None:
            refuse(gm, node, f"{node.name} ({node.target}) after the LM head is not token-wise")
            return []
        node = source
        chain.insert(0, node)
    return chain


def _token_wise_source(node: Node) -> Node | None:
    """The one operand of a pointwise op or cast that is not a number or a weight for all tokens."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise not in node.target.tags and not is_call(node, aten.to.dtype):
        return None
    sources = [arg for arg in node.all_input_nodes if not _is_for_all_tokens(arg)]
    if len(sources) != 1 or fake(sources[0]).dim() != fake(node).dim():
        return None
    return sources[0]


def _is_for_all_tokens(node: Node) -> bool:
    shape = fake(node).shape
    return "weight" in node.meta and (len(shape) < 2 or shape[-2] == 1)
