"""LayerNorm in one op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import bind, calls, fake, insert_call, is_call, operands, refuse, replace
from inlay.passes.norm_pattern import (
    Gain,
    Normalised,
    epsilon,
    gain_of,
    normalised,
    only_cast,
    source_of,
    why_not_mean_square,
)

aten = torch.ops.aten
LAYER_NORM = torch.ops.inlay.layer_norm.default


def fuse_layer_norm(gm: GraphModule) -> int:
    """torch's own op, and the norm written out (cohere); before fuse_rms_norm, which it resembles.

        wide = x.float(); centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
        out = (weight.float() * normed + bias.float()).to(x.dtype)
        out = aten.layer_norm(x, [hidden], weight + 1, bias, eps)  # nemotron: LayerNorm1P
    ->
        out = inlay.layer_norm(x, weight, bias, eps, weight_offset)

    Casts around the norm go into it: it computes in float32 and rounds once. A factor that is not
    a weight for the whole norm (one row for each head, another tensor) stays outside.
    """
    count = 0
    for node in calls(gm, aten.layer_norm.default):
        count += _rename(gm, node)
    for node in calls(gm, aten.mul.Tensor, aten.div.Tensor):
        # Nothing reads what an earlier rewrite has made useless.
        found = normalised(node) if node.users else None
        if found is None or not _is_centred(found.wide):
            continue
        if reason := _refusal(found):
            refuse(gm, found.node, reason)
            continue
        _fuse(gm, found)
        count += 1
    return count


def _rename(gm: GraphModule, node: Node) -> int:
    given = bind(node)
    if len(given["normalized_shape"]) != 1:
        refuse(gm, node, f"the norm is over dimensions {given['normalized_shape']}, not the last")
        return 0
    wide, weight, bias = given["input"], given["weight"], given["bias"]
    gain = None if weight is None else gain_of(weight, fake(wide).shape[-1])
    if weight is not None and (gain is None or gain.dtype != fake(gain.weight).dtype):
        gain = Gain(weight, 0.0, fake(weight).dtype)
    _replace(gm, node, wide, gain, bias, given["eps"])
    return 1


def _is_centred(node: Node) -> bool:
    """Whether a node is a tensor less a mean of it."""
    if not is_call(node, aten.sub.Tensor):
        return False
    wide, mean = node.args
    return is_call(mean, aten.mean.dim) and mean.args[0] is wide


def _refusal(found: Normalised) -> str:
    """Why a centred tensor over a root is not a layer norm, "" if it is."""
    if epsilon(found) is None:
        return "no constant epsilon is added under the root"
    wide, mean = found.wide.args[:2]
    last = (-1, fake(wide).dim() - 1)
    if len(mean.args[1]) != 1 or mean.args[1][0] not in last or mean.args[2:] != (True,):
        return f"the mean is over dimensions {mean.args[1]}, not the last one, kept"
    if found.wide.kwargs:
        return "a multiple of the mean is taken off"
    if fake(wide).dtype != torch.float32:
        return f"the norm is computed in {fake(wide).dtype}, not torch.float32"
    variance = found.shifted.args[0]
    if is_call(variance, aten.var.correction, aten.var.dim) and variance.args[0] is wide:
        given = bind(variance)
        corrected = given.get("unbiased", given.get("correction") != 0)
        plain = not corrected and given["keepdim"] and list(given["dim"] or ()) == [-1]
        return "" if plain else "the variance is not that of the last dimension, uncorrected"
    return why_not_mean_square(variance, found.wide)


def _fuse(gm: GraphModule, found: Normalised) -> None:
    """Take in a weight, and then a bias, where nothing else reads what is before them."""
    wide = found.wide.args[0]
    hidden = fake(wide).shape[-1]
    end, gain, bias = found.node, None, None
    scale, factor = _other(end, aten.mul.Tensor)
    found_gain = gain_of(factor, hidden)
    if scale is not None and found_gain and _is_wide(found_gain, wide):
        end, gain = scale, found_gain
    shift, summand = _other(end, aten.add.Tensor)
    found_bias = gain_of(summand, hidden)
    if shift is not None and found_bias and not found_bias.offset and _is_wide(found_bias, wide):
        end, bias = shift, found_bias.weight
    _replace(gm, end, wide, gain, bias, epsilon(found))


def _is_wide(gain: Gain, wide: Node) -> bool:
    """Whether the op computes with this weight what the graph does: all of it in float32."""
    return gain.dtype == torch.float32 and (
        gain.offset == 0 or fake(gain.weight).dtype == torch.float32
    )


def _other(node: Node, target: object) -> tuple[Node | None, object]:
    """A node's single user, where that is a plain call of this op, and what else the call reads."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], target) or users[0].kwargs:
        return None, None
    return users[0], next((one for one, other in operands(users[0]) if other is node), None)


def _replace(
    gm: GraphModule,
    end: Node,
    wide: Node,
    gain: Gain | None,
    bias: Node | None,
    eps: float | None,
) -> None:
    """The op in the place of a norm's end, or of the cast back behind it."""
    parts = [gain.weight if gain else None, bias]
    x = source_of(wide)
    cast = only_cast(end, fake(x).dtype)
    if x is not wide and cast is not None:
        end = cast
        parts = [part and source_of(part) for part in parts]
    else:
        x = wide
        parts = [part and _widened(gm, end, part, fake(x).dtype) for part in parts]
    offset = gain.offset if gain else 0.0
    replace(end, insert_call(gm.graph, end, LAYER_NORM, x, *parts, eps, offset))


def _widened(gm: GraphModule, before: Node, part: Node, dtype: torch.dtype) -> Node:
    """A weight in float32 where the norm's input is that and the weight is not."""
    if dtype != torch.float32 or fake(part).dtype == dtype:
        return part
    return insert_call(gm.graph, before, aten.to.dtype, part, dtype)
