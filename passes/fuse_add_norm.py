"""Residual addition and the norm that follows it in one op."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import calls, fake, insert_call, is_call, refuse, replace, same_shape

aten = torch.ops.aten
ops = torch.ops.inlay
WITH_ADD = {
    ops.rms_norm.default: ops.add_rms_norm.default,
    ops.layer_norm.default: ops.add_layer_norm.default,
}


def fuse_add_norm(gm: GraphModule) -> int:
    """One pass over memory for the sum, which lives on as the next residual, and its norm.

        total = x + residual
        normed = inlay.rms_norm(total, weight, eps, ...)
    ->
        normed, total = inlay.add_rms_norm(x, residual, weight, eps, ...)

    The same for inlay.layer_norm and inlay.add_layer_norm.
    """
    count = 0
    for norm in calls(gm, *WITH_ADD):
        total = norm.args[0]
        if not is_call(total, aten.add.Tensor):
            continue
        assert isinstance(total, Node)
        if not _is_plain_sum(total):
            refuse(gm, norm, "the sum before the norm scales, casts or broadcasts a summand")
            continue
        # In the sum's place: its other users may stand before the norm.
        fused = insert_call(gm.graph, total, WITH_ADD[norm.target], *total.args, *norm.args[1:])
        normed = insert_call(gm.graph, total, operator.getitem, fused, 0)
        kept = insert_call(gm.graph, total, operator.getitem, fused, 1)
        fused.meta.update({k: v for k, v in norm.meta.items() if k != "val"})
        replace(norm, normed)
        replace(total, kept)
        count += 1
    return count


def _is_plain_sum(total: Node) -> bool:
    if total.kwargs or not all(isinstance(arg, Node) for arg in total.args):
        return False
    return all(
        same_shape(fake(arg), fake(total)) and fake(arg).dtype == fake(total).dtype
        for arg in total.all_input_nodes
    )
