"""Rotation of pairs by complex multiplication, in real numbers."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import (
    calls,
    fake,
    insert_call,
    is_call,
    operands,
    refuse,
    replace,
    same_shape,
)

aten = torch.ops.aten
ROPE = torch.ops.inlay.rope.default
ONES = (aten.ones_like.default, aten.ones.default)
ROWS = (aten.unsqueeze.default, aten.select.int, aten.expand.default)


def rewrite_complex(gm: GraphModule) -> int:
    """Complex numbers are slow in compilers, or unknown to them.

        pairs = view_as_complex(x.reshape(..., D // 2, 2))
        out = view_as_real(pairs * polar(ones, angles)).flatten(-2)
    ->
        out = inlay.rope(x, angles.cos(), angles.sin(), interleaved=True)
    """
    count = 0
    for node in calls(gm, aten.reshape.default):
        product = _product(node)
        if product is None:
            continue
        pairs, turn = product
        tables = _parts(turn)
        if tables is None:
            refuse(gm, node, "the complex factor is not polar(ones, angles)")
            continue
        x = _joined(node, pairs.args[0])
        replace(node, insert_call(gm.graph, node, ROPE, x, *tables, True))
        count += 1
    return count


def _product(node: Node) -> tuple[Node, Node] | None:
    """view_as_complex(...) and what it is multiplied by, where the result is joined again."""
    real = node.args[0]
    if not is_call(real, aten.view_as_real.default) or fake(node).dim() != fake(real).dim() - 1:
        return None
    joined = fake(node).shape[-1] == fake(real).shape[-2] * 2
    if not joined or not is_call(real.args[0], aten.mul.Tensor):
        return None
    for pairs, turn in operands(real.args[0]):
        if is_call(pairs, aten.view_as_complex.default) and isinstance(turn, Node):
            return (pairs, turn) if same_shape(fake(pairs), fake(real.args[0])) else None
    return None


def _joined(node: Node, pairs: Node) -> Node:
    """A tensor of pairs [..., D // 2, 2] in the shape of a node, [..., D]."""
    if is_call(pairs, aten.reshape.default) and same_shape(fake(pairs.args[0]), fake(node)):
        return pairs.args[0]
    return insert_call(node.graph, node, aten.reshape.default, pairs, node.args[1])


def _parts(turn: Node) -> tuple[Node, Node] | None:
    """Cosine and sine of a complex factor's angles, made where the factor is made."""
    if is_call(turn, aten.polar.default):
        if not is_call(turn.args[0], *ONES):
            return None
        cos, sin = (_beside(turn, op, turn.args[1]) for op in (aten.cos.default, aten.sin.default))
        return cos, sin
    scaled = is_call(turn, aten.mul.Tensor) and isinstance(turn.args[1], int | float)
    if not scaled and not is_call(turn, *ROWS):
        return None
    parts = _parts(turn.args[0])
    if parts is None:
        return None
    cos, sin = (_beside(turn, turn.target, part, *turn.args[1:]) for part in parts)
    return cos, sin


def _beside(node: Node, target: object, *args: object) -> Node:
    """A call in front of a node, made once: a table is the same for all layers."""
    first = args[0]
    assert isinstance(first, Node)
    for user in first.users:
        if is_call(user, target) and user.args == args:
            return user
    return insert_call(node.graph, node, target, *args)
