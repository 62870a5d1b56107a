"""What RMSNorm and LayerNorm have in common in a graph: `tensor / sqrt(mean square + eps)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from inlay.passes.graph import fake, is_call, operands, strip_cast

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalised:
    """node: `tensor * rsqrt(...)`. wide: the tensor. shifted: what is under the root."""

    node: Node
    wide: Node
    shifted: Node


@dataclass(frozen=True)
class Gain:
    """The factor of a norm: weight + offset, computed in dtype."""

    weight: Node
    offset: float
    dtype: torch.dtype


def normalised(node: Node) -> Normalised | None:
    """A tensor that is divided by a root, in any spelling of that; None for anything else."""
    if is_call(node, aten.div.Tensor):
        pairs = [(node.args[0], _under_root(node.args[1], aten.sqrt.default))]
    elif is_call(node, aten.mul.Tensor):
        pairs = [(wide, _under_inverse_root(root)) for wide, root in operands(node)]
    else:
        return None
    for wide, shifted in pairs:
        if isinstance(wide, Node) and shifted is not None:
            return Normalised(node, wide, shifted)
    return None


def _under_root(value: Any, root: Any) -> Any:
    return value.args[0] if is_call(value, root) else None


def _under_inverse_root(value: Any) -> Any:
    """x of rsqrt(x), pow(x, -0.5) or 1 / sqrt(x)."""
    if is_call(value, aten.pow.Tensor_Scalar) and value.args[1] == -0.5:
        return value.args[0]
    if is_call(value, aten.reciprocal.default):
        return _under_root(value.args[0], aten.sqrt.default)
    return _under_root(value, aten.rsqrt.default)


def epsilon(found: Normalised) -> float | None:
    """The constant that is added under the root, None where there is none."""
    shifted = found.shifted
    if not is_call(shifted, aten.add.Tensor) or shifted.kwargs:
        return None
    return shifted.args[1] if isinstance(shifted.args[1], float) else None


def why_not_mean_square(node: Node, tensor: Node) -> str:
    """Why a node is not the mean of a tensor's squares over its last dimension; "" if it is."""
    last = (-1, fake(tensor).dim() - 1)
    if not is_call(node, aten.mean.dim) or len(node.args) != 3 or node.kwargs:
        return "the root is not of a mean that keeps its dimension"
    if len(node.args[1]) != 1 or node.args[1][0] not in last or not node.args[2]:
        return f"the mean is over dimensions {node.args[1]}, not the last one, kept"
    square = node.args[0]
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[0] is tensor:
        return "" if square.args[1] == 2 else f"the exponent is {square.args[1]}, not 2"
    if is_call(square, aten.square.default) and square.args[0] is tensor:
        return ""
    if is_call(square, aten.mul.Tensor) and square.args == (tensor, tensor):
        return ""
    return "the mean is not of the square of the tensor that is normalised"


def gain_of(factor: object, hidden: int) -> Gain | None:
    """The weight [hidden], or weight plus a constant, that a norm is scaled by."""
    if not isinstance(factor, Node):
        return None
    offset, value = 0.0, factor
    if is_call(factor, aten.add.Tensor) and not factor.kwargs:
        value, added = factor.args
        if not isinstance(added, int | float):
            return None
        offset = float(added)
    weight = strip_cast(value)
    if "weight" not in weight.meta or tuple(fake(weight).shape) != (hidden,):
        return None
    return Gain(weight, offset, fake(factor).dtype)


def casts_of(node: Node, dtype: torch.dtype | None = None) -> list[Node]:
    """The casts of a node, to this dtype or to any, that something reads."""
    casts = [user for user in node.users if is_call(user, aten.to.dtype) and user.users]
    return [cast for cast in casts if dtype is None or fake(cast).dtype == dtype]


def only_cast(node: Node, dtype: torch.dtype) -> Node | None:
    """The node's single user, where that is a cast to this dtype."""
    casts = casts_of(node, dtype)
    return casts[0] if len(node.users) == 1 and casts else None


def source_of(wide: Node) -> Node:
    """What was widened for the norm; integers stay, for the ops return the dtype they are given."""
    x = strip_cast(wide)
    return x if fake(x).dtype.is_floating_point else wide
