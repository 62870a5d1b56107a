"""Positions that a model counts by itself, taken from the step's inputs."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import bind, calls, fake, insert_call, replace

aten = torch.ops.aten
ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def use_position_ids(gm: GraphModule) -> int:
    """Counting the tokens of a row gives positions where the row is one request only.

        arange(num_tokens)    ->    position_ids[0]

    Masks count tokens too, but are gone from a captured graph; what is left embeds positions
    (BART and its kin, whose forward takes none).
    """
    positions = next(n for n in gm.graph.nodes if n.meta.get("input") == "position_ids")
    size = str(fake(positions).shape[1])
    count = 0
    for node in calls(gm, *ARANGES):
        if str(fake(node).shape[0]) != size or not _counts_from_zero(node):
            continue
        row = insert_call(gm.graph, node, aten.select.int, positions, 0, 0)
        if fake(row).dtype != fake(node).dtype:
            row = insert_call(gm.graph, node, aten.to.dtype, row, fake(node).dtype)
        replace(node, row)
        count += 1
    return count


def _counts_from_zero(node: Node) -> bool:
    arguments = bind(node)
    return arguments.get("start", 0) == 0 and arguments.get("step", 1) == 1
