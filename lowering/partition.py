"""Cut the paged graph at its attention ops: one program, and the distinct segments it calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from inlay.backends.graph_json import graph_key, graph_to_json
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.errors import UnsupportedModelError
from inlay.passes.graph import is_call, placeholder_key

PAGED_ATTENTION = torch.ops.inlay.paged_attention.default
FLOATING = -1
"""Depth of what depends on weights alone: it is copied into each segment that uses it."""


def partition(gm: GraphModule, dtype: torch.dtype) -> tuple[Program, dict[str, GraphModule]]:
    """Program and segments by key, from a graph after insert_paged_kv and gather_last_logits.

    A node's depth is the number of attention ops before it. Segments are first (embedding,
    rotary tables, first projections), middles, tail (final hidden states) and LM head.
    """
    depths = _depths(gm)
    output = next(iter(gm.graph.find_nodes(op="output")))
    logits = output.args[0]
    logits = logits[0] if isinstance(logits, list | tuple) else logits
    by_depth: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        if depths.get(node, FLOATING) != FLOATING and node.op == "call_function":
            by_depth.setdefault(depths[node], []).append(node)
    steps: list[SegmentStep | AttentionStep] = []
    segments: dict[str, GraphModule] = {}
    hidden = ""
    for depth in sorted(by_depth):
        members = [n for n in by_depth[depth] if not is_call(n, PAGED_ATTENTION)]
        attentions = [n for n in by_depth[depth] if is_call(n, PAGED_ATTENTION)]
        outputs = _outputs(members, depths, depth, logits)
        if members:
            if any(_is_gather(node) for node in members):
                hidden = next(node for node in members if _is_gather(node)).args[0].name
            step, segment = _segment(members, outputs)
            steps.append(step)
            segments.setdefault(step.segment, segment)
        steps.extend(_attention(node) for node in attentions)
    program = Program(
        steps=tuple(steps),
        hidden=hidden or logits.name,
        logits=logits.name,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=int(logits.meta["val"].shape[-1]),
    )
    return program, segments


def _is_gather(node: Node) -> bool:
    return any(arg.meta.get("input") == "logits_indices" for arg in node.all_input_nodes)


def _depths(gm: GraphModule) -> dict[Node, int]:
    """Attention's outputs, and the gathered rows of the LM head, begin a new depth."""
    depths: dict[Node, int] = {}
    ready: dict[Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            ready[node] = FLOATING if "weight" in node.meta else 0
            continue
        sources = [ready[arg] for arg in node.all_input_nodes]
        depth = max(sources, default=FLOATING)
        if _is_gather(node):
            depth += 1
        depths[node] = depth
        ready[node] = depth + 1 if is_call(node, PAGED_ATTENTION) else depth
    return depths


def _outputs(members: list[Node], depths: dict[Node, int], depth: int, logits: Node) -> list[Node]:
    """The members that a later depth, an attention op or the caller reads."""
    inside = set(members)
    return [
        node
        for node in members
        if isinstance(node.meta["val"], torch.Tensor)
        and (node is logits or any(user not in inside for user in node.users))
    ]


def _segment(members: list[Node], outputs: list[Node]) -> tuple[SegmentStep, GraphModule]:
    """One segment: placeholders in order of first use, weights before inputs."""
    inside = dict.fromkeys([*_floating(members), *members])
    external: dict[Node, None] = {}
    for node in inside:
        external.update(dict.fromkeys(a for a in node.all_input_nodes if a not in inside))
    sizes = [node for node in external if not isinstance(node.meta["val"], torch.Tensor)]
    tensors = [node for node in external if node not in sizes]
    weights = [node for node in tensors if "weight" in node.meta]
    inputs = [node for node in tensors if "weight" not in node.meta]
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in (*weights, *inputs):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta["val"]
        if "weight" in node.meta:
            copies[node].meta["weight"] = node.meta["weight"]
    for size in sizes:
        copies[size] = _size_from(inputs, size, graph, copies)
    for node in inside:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    for node in outputs:
        if _is_read_strided(node, inside):
            value = copies[node].meta["val"]
            copies[node] = graph.call_function(torch.ops.aten.contiguous.default, (copies[node],))
            copies[node].meta["val"] = value.contiguous()
    graph.output(tuple(copies[node] for node in outputs))
    gm = GraphModule(torch.nn.Module(), graph)
    step = SegmentStep(
        segment=graph_key(graph_to_json(gm)),
        weights=tuple(placeholder_key(node) for node in weights),
        inputs=tuple(_value_name(node) for node in inputs),
        outputs=tuple(node.name for node in outputs),
    )
    return step, gm


def _is_read_strided(node: Node, inside: Iterable[Node]) -> bool:
    """Whether another segment reads what may be a view with gaps: segments are compiled for dense
    inputs, and do not look at strides. Attention does."""
    readers = [n for n in node.users if n not in inside and n.op != "output"]
    dense = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format).stride()
    is_strided = node.meta["val"].stride() != dense or _is_view(node)
    return is_strided and any(not is_call(reader, PAGED_ATTENTION) for reader in readers)


def _is_view(node: Node) -> bool:
    """Whether it shares memory with another value. Export's strides of such are not to be relied
    on: behind an in-place op on a view (gemma3n) they are dense for what has gaps."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    return any(returned.alias_info is not None for returned in node.target._schema.returns)


def _floating(members: Iterable[Node]) -> list[Node]:
    """Weight-only expressions the members use, in graph order."""
    found: dict[Node, None] = {}

    def visit(node: Node) -> None:
        for arg in node.all_input_nodes:
            if arg.op == "call_function" and arg not in found and _is_floating(arg):
                visit(arg)
                found[arg] = None

    for node in members:
        visit(node)
    return list(found)


def _is_floating(node: Node) -> bool:
    if node.op == "placeholder":
        return "weight" in node.meta
    return all(_is_floating(arg) for arg in node.all_input_nodes)


def _size_from(inputs: list[Node], size: Node, graph: Graph, copies: dict[Node, Node]) -> Node:
    """A symbolic size, asked of a tensor that this segment has anyway."""
    wanted = str(size.meta["val"])
    for node in inputs:
        for dim, extent in enumerate(node.meta["val"].shape):
            if str(extent) == wanted:
                target = torch.ops.aten.sym_size.int
                copy = graph.call_function(target, (copies[node], dim))
                copy.meta["val"] = size.meta["val"]
                return copy
    raise UnsupportedModelError(
        f"the size {wanted} that {size.name} computes is not the size of any tensor at hand after "
        f"an attention layer; {size.meta.get('stack_trace', '')}"
    )


def _value_name(node: Node) -> str:
    return node.meta["input"] if node.op == "placeholder" else node.name


def _attention(node: Node) -> AttentionStep:
    names = [argument.name for argument in node.target._schema.arguments]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}
    bound: dict[str, Any] = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = bound["q"].meta["val"], bound["k"].meta["val"], bound["v"].meta["val"]
    group = int(bound["slot_mapping"].meta["input"].rpartition(".")[2])
    weights = {
        name: None if bound[name] is None else placeholder_key(bound[name])
        for name in ("sinks", "slopes")
    }
    return AttentionStep(
        layer=bound["layer"],
        group=group,
        query=bound["q"].name,
        key=bound["k"].name,
        value=bound["v"].name,
        output=node.name,
        num_heads=int(query.shape[1]),
        num_kv_heads=int(key.shape[1]),
        head_dim=int(key.shape[2]),
        v_head_dim=int(value.shape[2]),
        scale=bound["scale"],
        window=bound["window"],
        softcap=bound["softcap"],
        sinks=weights["sinks"],
        causal=bound["causal"],
        chunk=bound["chunk"],
        slopes=weights["slopes"],
        cache=int(bound["k_cache"].meta["input"].rpartition(".")[2]),
    )
