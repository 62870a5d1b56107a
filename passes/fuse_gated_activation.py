"""The gates of SwiGLU, GeGLU and other gated feed-forward layers in one op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.activations import activation_of
from inlay.passes.graph import calls, fake, insert_call, operands, refuse, replace, same_shape

aten = torch.ops.aten
GATED = torch.ops.inlay.gated.default


def fuse_gated_activation(gm: GraphModule) -> int:
    """activation(gate) * up    ->    inlay.gated(gate, up, "activation")

    The activation is known by what it computes, so any spelling of it will do.
    """
    count = 0
    for node in calls(gm, aten.mul.Tensor):
        if activation_of(node) is not None:
            continue  # x * sigmoid(1.702 * x) is no gate, but what a gate may go through
        for active, up in operands(node):
            found = activation_of(active)
            if found is None:
                continue
            activation, gate = found
            if not isinstance(up, Node) or not _are_alike(node, gate, up):
                refuse(gm, node, "gate and up differ in shape or dtype")
                continue
            replace(node, insert_call(gm.graph, node, GATED, gate, up, activation))
            count += 1
            break
    return count


def _are_alike(node: Node, gate: Node, up: Node) -> bool:
    return all(
        same_shape(fake(one), fake(node)) and fake(one).dtype == fake(node).dtype
        for one in (gate, up)
    )
