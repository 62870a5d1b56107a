"""Activation functions by what they compute, however a model spells them."""

from __future__ import annotations

import torch
from torch.fx import Node

from inlay.passes.graph import fake, is_call, same_shape
from inlay.passes.ops import ACTIVATIONS

aten = torch.ops.aten

MAX_NODES = 14
"""The longest spelling known, gelu by tanh, has 9 nodes."""
CURVED = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.erf.default,
    aten.softplus.default,
    aten.mish.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
"""No activation is written without one of these."""
POINTS = torch.cat([torch.linspace(-9, 9, 61), torch.tensor([-0.3, 0.01, 0.7])]).double()
TOLERANCE = 1e-6
"""Models round the constants of tanh-GELU to 8 digits; kinds of GELU are 5e-4 and more apart."""


def activation_of(node: object) -> tuple[str, Node] | None:
    """(name, x) where a node is the activation of that name of x; None where it is none.

    Goes back from the node through elementwise ops as long as they depend on one tensor alone,
    and compares the function that they make with the known ones, at some points in float64.
    """
    if not isinstance(node, Node):
        return None
    inside: list[Node] = []
    edge = {node}
    while len(inside) < MAX_NODES:
        last = max(edge)
        if not _is_elementwise(last):
            return None
        edge.remove(last)
        inside.append(last)
        edge.update(last.all_input_nodes)
        if len(edge) == 1 and any(is_call(one, *CURVED) for one in inside):
            (x,) = edge
            name = _name(inside, x) if _keeps_precision(inside, x) else None
            if name is not None and fake(x).dtype == fake(node).dtype:
                return name, x
    return None


def _keeps_precision(inside: list[Node], x: Node) -> bool:
    """Whether x holds real numbers, and nothing rounds them to a narrower dtype on the way."""
    given = fake(x).dtype
    dtypes = {fake(node).dtype for node in inside}
    return given.is_floating_point and all(
        torch.promote_types(dtype, given) == dtype for dtype in dtypes
    )


def _is_elementwise(node: Node) -> bool:
    """A pointwise op, or a cast, of tensors of its own shape and numbers."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise not in node.target.tags and not is_call(node, aten.to.dtype):
        return False
    return bool(node.all_input_nodes) and all(
        isinstance(arg.meta["val"], torch.Tensor) and same_shape(fake(arg), fake(node))
        for arg in node.all_input_nodes
    )


def _name(inside: list[Node], x: Node) -> str | None:
    values = {x: POINTS}
    for node in reversed(inside):
        if is_call(node, aten.to.dtype):
            values[node] = values[node.args[0]]
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    result = values[inside[0]]
    for name, function in ACTIVATIONS.items():
        if torch.allclose(result.double(), function(POINTS), TOLERANCE, TOLERANCE):
            return name
    return None
