"""RMSNorm in one op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import bind, calls, fake, insert_call, is_call, operands, refuse, replace
from inlay.passes.norm_pattern import (
    Gain,
    Normalised,
    casts_of,
    epsilon,
    gain_of,
    normalised,
    only_cast,
    source_of,
    why_not_mean_square,
)

aten = torch.ops.aten
RMS_NORM = torch.ops.inlay.rms_norm.default


def fuse_rms_norm(gm: GraphModule) -> int:
    """The llama form scales after the cast back, the gemma form (1 + w) before it, some never.

        wide = x.float()
        normed = wide * rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        out = weight * normed.to(x.dtype)                 # llama
        out = (normed * (1 + weight.float())).to(x.dtype) # gemma
        out = normed.to(x.dtype)                          # nanochat: the weight is None
    ->
        out = inlay.rms_norm(x, weight, eps, weight_offset, scale_in_float)

    In float32 the casts are absent, and the first two forms differ by the offset alone. A factor
    that is not a weight for the whole norm (one row for each head, another tensor) stays outside.
    """
    count = _rename(gm)
    for node in calls(gm, aten.mul.Tensor, aten.div.Tensor):
        # Nothing reads what an earlier rewrite has made useless.
        found = normalised(node) if node.users else None
        if found is None:
            continue
        if reason := _refusal(found):
            refuse(gm, found.node, reason)
            continue
        count += _fuse_scaled(gm, found) + _fuse_unscaled(gm, found)
    return count


def _rename(gm: GraphModule) -> int:
    """torch's own op scales before it casts."""
    count = 0
    for node in calls(gm, aten.rms_norm.default):
        given = bind(node)
        if len(given["normalized_shape"]) != 1 or given["eps"] is None:
            refuse(gm, node, "the norm is over several dimensions, or its epsilon is not given")
            continue
        args = (given["input"], given["weight"], given["eps"], 0.0, True)
        replace(node, insert_call(gm.graph, node, RMS_NORM, *args))
        count += 1
    return count


def _refusal(found: Normalised) -> str:
    """Why `wide * rsqrt(...)` is not a root mean square over the last dimension, "" if it is."""
    if epsilon(found) is None:
        return "no constant epsilon is added under the root"
    reason = why_not_mean_square(found.shifted.args[0], found.wide)
    if not reason and fake(found.wide).dtype != torch.float32:
        return f"the norm is computed in {fake(found.wide).dtype}, not torch.float32"
    return reason


def _fuse_scaled(gm: GraphModule, found: Normalised) -> int:
    """Put the op in for each product of the norm and a weight: norms may share their input."""
    hidden = fake(found.wide).shape[-1]
    count = 0
    for normed in (found.node, *casts_of(found.node)):
        for scale in [user for user in normed.users if is_call(user, aten.mul.Tensor)]:
            factor = next((one for one, other in operands(scale) if other is normed), None)
            gain = gain_of(factor, hidden)
            form = None if gain is None else _form(found, normed, scale, gain)
            if gain is None or form is None:
                continue
            end, x, in_float = form
            args = (x, gain.weight, epsilon(found), gain.offset, in_float)
            replace(end, insert_call(gm.graph, end, RMS_NORM, *args))
            if end is not scale:
                gm.graph.erase_node(scale)
            count += 1
    return count


def _form(
    found: Normalised, normed: Node, scale: Node, gain: Gain
) -> tuple[Node, Node, bool] | None:
    """Last node and input of a norm, and whether it scales in float32; None for other casts."""
    for x in (source_of(found.wide), found.wide):
        dtype = fake(x).dtype
        dtypes = {fake(normed).dtype, fake(scale).dtype, fake(gain.weight).dtype, gain.dtype}
        if dtypes == {dtype}:
            return scale, x, dtype == torch.float32 and gain.offset != 0
        cast = only_cast(scale, dtype)
        wide_gain = gain.dtype == torch.float32 or (
            gain.offset == 0 and gain.dtype == fake(gain.weight).dtype
        )
        if cast is not None and normed is found.node and wide_gain:
            return cast, x, True
    return None


def _fuse_unscaled(gm: GraphModule, found: Normalised) -> int:
    """The op without a weight for whatever else reads the norm."""
    x = source_of(found.wide)
    ends = [(cast, x) for cast in casts_of(found.node, fake(x).dtype)]
    rest = [user for user in found.node.users if user not in dict(ends)]
    if any(user.users or user.op == "output" for user in rest):
        ends.append((found.node, found.wide))
    for end, source in ends:
        replace(end, insert_call(gm.graph, end, RMS_NORM, source, None, epsilon(found)))
    return len(ends)
