"""Known-bad twins of a captured model: the same graph with one part broken.

A configuration proves something only where its twins give other tokens: a model that repeats one
token whatever is done to it agrees with any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Interpreter
from transformers import PreTrainedModel

from inlay.lowering.export import Captured
from inlay.passes.graph import bind, calls, copy_graph, placeholder_key
from inlay.passes.weights import make_weight

ATTENTION = torch.ops.inlay.attention.default

Twin = Callable[[Captured], Captured]


def logits_of(captured: Captured, token_ids: torch.Tensor) -> torch.Tensor:
    """The graph's float32 output [n, vocab or hidden] for one request [n]."""
    values = {**captured.sources, "input_ids": token_ids[None]}
    values["position_ids"] = torch.arange(len(token_ids))[None]
    recipes = captured.graph.meta["recipes"]
    arguments = []
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        name = placeholder_key(node)
        arguments.append(make_weight(name, recipes, values.__getitem__))
    with torch.no_grad():
        output = Interpreter(captured.graph).run(*arguments)
    output = output[0] if isinstance(output, tuple | list) else output
    return output[0].float()


def changed(captured: Captured, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Captured:
    """With other weights: change(name, tensor)."""
    sources = {name: change(name, tensor) for name, tensor in captured.sources.items()}
    return Captured(captured.graph, sources)


def attention_changed(captured: Captured, **factors: Callable[[float], float]) -> Captured:
    """With other numbers for attention's arguments, where these are not 0."""
    gm = copy_graph(captured.graph)
    for node in calls(gm, ATTENTION):
        bound = bind(node)
        for name, factor in factors.items():
            bound[name] = factor(bound[name]) if bound[name] else bound[name]
        node.args, node.kwargs = tuple(bound.values()), {}
    gm.recompile()
    return Captured(gm, captured.sources)


def twins(model: PreTrainedModel, captured: Captured) -> dict[str, Captured]:
    """Every twin that applies to this model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {"scale x 1.1": attention_changed(captured, scale=lambda s: 1.1 * s)}
    arguments = [bind(node) for node in calls(captured.graph, ATTENTION)]
    for name in ("window", "chunk"):
        if any(bound[name] for bound in arguments):
            off = attention_changed(captured, **{name: lambda size: size + 1})
            found[f"{name} off by one"] = off
    read = {n.meta.get("weight") for n in captured.graph.graph.find_nodes(op="placeholder")}
    for name, (applies, change) in WEIGHTS.items():
        used = [n for n in captured.sources if n in read and applies(n, n in parameters)]
        if used:
            found[name] = changed(captured, lambda n, t, u=used, c=change: c(t) if n in u else t)
    return found


def _is_norm(name: str, is_parameter: bool) -> bool:
    owner, _, kind = name.rpartition(".")
    return is_parameter and kind == "weight" and "norm" in owner.rpartition(".")[2].lower()


WEIGHTS: dict[str, tuple[Callable[[str, bool], bool], Callable[[torch.Tensor], torch.Tensor]]] = {
    "no RoPE": (lambda name, _: name.endswith("inv_freq"), torch.zeros_like),
    "no positions": (
        lambda name, _: name.endswith(("embed_positions", "embed_positions.weight", "wpe.weight")),
        lambda table: table[:1].expand_as(table),
    ),
    "biases zeroed": (lambda name, given: given and name.endswith("bias"), torch.zeros_like),
    "norms ignored": (_is_norm, lambda weight: weight.mean().expand_as(weight)),
}
