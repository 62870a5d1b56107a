"""Where a pass must find its pattern: read off the captured modules, not the pattern itself.

Each function names the modules where a match is due, one entry per match. No table of model names
decides: class names say what transformers calls a thing, widths say how it is built.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes import fuse_attention
from inlay.passes.gather_last_logits import LINEAR, is_encoder
from inlay.passes.graph import bind, calls, fake, is_call, is_within, module_of, modules_named

aten = torch.ops.aten
ATTENTION = torch.ops.inlay.attention.default
EXPERTS = torch.ops.inlay.experts.default
PRODUCTS = (LINEAR, aten.bmm.default)
FEED_FORWARD = re.compile("(MLP|Mlp|FFN|FeedForward|Experts|MoE|Moe)$")
CENTRING = (aten.layer_norm.default, aten.sub.Tensor, aten.var.correction, aten.var.dim)
PROJECTIONS = (LINEAR, ATTENTION, aten.matmul.default, aten.bmm.default, aten.embedding.default)
VIEWS = (aten.slice.Tensor, aten.select.int)
AVERAGING = (aten.mean.dim, aten.rms_norm.default, *CENTRING)


@dataclass
class ModuleCall:
    """One call of a captured module: name, class, and nodes, those of its parts included."""

    name: str
    kind: str
    nodes: list[Node] = field(default_factory=list)


def module_calls(gm: GraphModule) -> dict[str, ModuleCall]:
    """Every call of a module, in order: a module that is called twice is there twice."""
    found: dict[str, ModuleCall] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            for key, (name, kind) in node.meta.get("nn_module_stack", {}).items():
                found.setdefault(key, ModuleCall(name, kind)).nodes.append(node)
    return found


def rms_norms(gm: GraphModule) -> list[str]:
    """Every call of a norm that takes off no mean."""
    return [call.name for call in _norms(gm) if not _uses(call, *CENTRING)]


def layer_norms(gm: GraphModule) -> list[str]:
    """Every call of a norm that takes off the mean."""
    return [call.name for call in _norms(gm) if _uses(call, *CENTRING)]


def _norms(gm: GraphModule) -> list[ModuleCall]:
    """Modules of a class called ...Norm..., without those that are made of norms (one a head).

    What averages nothing is no norm; what holds linear layers is a block with one in its name.
    """
    norms = [call for call in module_calls(gm).values() if "Norm" in call.kind]
    return [
        call
        for call in norms
        if _uses(call, *AVERAGING)
        and not _uses(call, LINEAR)
        and not any(is_within(one.name, call.name) for one in norms if one.name != call.name)
    ]


def _uses(call: ModuleCall, *targets: Any) -> bool:
    return any(is_call(node, *targets) for node in call.nodes)


def attentions(gm: GraphModule) -> list[str]:
    """Every attention call."""
    return [module_of(node) for node in calls(gm, ATTENTION)]


def plain_attentions(gm: GraphModule) -> list[str]:
    """Every attention that the model computes by itself."""
    return [module_of(node) for node in fuse_attention.plain_attentions(gm)]


def rotated(gm: GraphModule) -> list[str]:
    """Queries and keys that positions went into after their projection, once each.

    Layers may share keys, and one layer may attend twice with the same queries: operands that come
    from the same projections are one. A factor for each position, the same in all columns, is no
    rotation (Llama 4's temperature).
    """
    tables = _position_tables(gm)
    found: dict[tuple[str, frozenset[Node]], str] = {}
    for node in calls(gm, ATTENTION):
        for role, operand in zip("qk", node.args, strict=False):
            projections, is_rotated = _trace_back(operand, tables)
            if is_rotated:
                found.setdefault((role, projections), module_of(node))
    return list(found.values())


def _position_tables(gm: GraphModule) -> set[Node]:
    """Values with a number for each column that come from positions, and from no other input."""
    origins: dict[Node, set[str]] = {}
    for node in gm.graph.nodes:
        origins[node] = set().union(*(origins[one] for one in node.all_input_nodes))
        if "input" in node.meta:
            origins[node] = {node.meta["input"]}
    return {
        node for node, names in origins.items() if names == {"position_ids"} and _has_columns(node)
    }


def _has_columns(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return value.dim() > 0 and isinstance(value.shape[-1], int) and value.shape[-1] > 1


def _trace_back(operand: Any, tables: set[Node]) -> tuple[frozenset[Node], bool]:
    """The projections that an operand of attention comes from, and if a table joins on the way."""
    projections, is_rotated, seen = set(), False, set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in tables:
            is_rotated = True
        elif is_call(node, *PROJECTIONS):
            projections.add(node)
        else:
            stack.extend(node.all_input_nodes)
            stack.extend(_written_into(node))
    return frozenset(projections), is_rotated


def _written_into(node: Node) -> list[Node]:
    """What is copied into a tensor, or into a part of it."""
    parts = [node, *(user for user in node.users if is_call(user, *VIEWS))]
    copies = [user for part in parts for user in part.users if is_call(user, aten.copy_.default)]
    return [copy.args[1] for copy in copies if isinstance(copy.args[1], Node)]


def gates(gm: GraphModule) -> list[str]:
    """Every gated feed-forward layer, and whatever else has a linear layer called a gate."""
    return [*_gated_layers(gm), *_other_gates(gm)]


def fusible_gemms(gm: GraphModule) -> list[str]:
    """Attention with separate Q, K and V; gated feed-forward layers with separate gate and up.

    A module with more than two linear layers, the last being its output projection.
    """
    owners = dict.fromkeys([*attentions(gm), *_gated_layers(gm)])
    return [name for name in owners if len(_layers_of(gm, name)) > 2]


def lm_head(gm: GraphModule) -> list[str]:
    """The last linear layer, once; an encoder has none."""
    if is_encoder(gm):
        return []
    return [module_of(node) for node in calls(gm, LINEAR)[-1:]]


def _gated_layers(gm: GraphModule) -> list[str]:
    """Feed-forward layers whose products before the last give twice the last one's input width.

    A plain layer computes down(act(up(x))), a gated one down(act(gate(x)) * up(x)), be gate and
    up one matrix or two. Experts in plain code, one product for each, show it by the widest.
    """
    found = []
    for call in module_calls(gm).values():
        if not FEED_FORWARD.search(call.kind):
            continue
        *inner, down = [node for node in call.nodes if is_call(node, *PRODUCTS)] or [None]
        if down is None:
            continue
        widths = [int(fake(node).shape[-1]) for node in inner]
        if 2 * int(fake(down.args[0]).shape[-1]) in (sum(widths), max(widths, default=0)):
            found.append(call.name)
    return [name for name in found if not any(_owner(one) == name for one in found)]


def _other_gates(gm: GraphModule) -> list[str]:
    """Owners of linear layers called ...gate... outside of feed-forward layers.

    Not those of one column, which weigh a whole token, nor those of one for each expert: routers.
    """
    feed_forward = modules_named(gm, lambda kind: bool(FEED_FORWARD.search(kind)))
    found = []
    for node in calls(gm, LINEAR):
        name, width = module_of(node), int(fake(node).shape[-1])
        if "gate" in name.rpartition(".")[2] and width > 1 and not is_router(gm, node):
            found.append(_owner(name))
    return [owner for owner in found if owner not in feed_forward]


def is_router(gm: GraphModule, node: Node) -> bool:
    """Whether a linear layer gives a number for each expert of the block that it belongs to."""
    name, width = module_of(node), int(fake(node).shape[-1])
    experts = calls(gm, EXPERTS, torch.ops.inlay.quantized_experts.default)
    blocks = [(_owner(module_of(one)), _num_experts(one)) for one in experts]
    return any(is_within(name, block) and width == number for block, number in blocks)


def _num_experts(experts: Node) -> int:
    return int(fake(bind(experts)["up"]).shape[0])


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _layers_of(gm: GraphModule, owner: str) -> set[str]:
    """The linear layers that a module holds itself."""
    names = {module_of(node) for node in calls(gm, LINEAR)}
    return {name for name in names if _owner(name) == owner}
