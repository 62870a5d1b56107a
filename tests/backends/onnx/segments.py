"""Segments to convert, and numbers to run them on."""

from __future__ import annotations

import functools

import torch
from torch.fx import GraphModule

from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.backends.program import Program
from inlay.lowering.partition import partition
from inlay.passes.graph import copy_graph
from inlay.passes.pass_manager import run_passes
from tests.passes.architectures import captured


@functools.cache
def segments_of(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[Program, dict[str, GraphModule]]:
    """A toy's program and segments, as partition gives them."""
    graph = copy_graph(captured(name, dtype).graph)
    run_passes(graph)
    return partition(graph, dtype)


def stored(gm: GraphModule) -> GraphModule:
    """The same as an artifact gives it."""
    return graph_from_json(graph_to_json(gm))


def random_values(gm: GraphModule, size: int) -> dict[str, torch.Tensor]:
    """For each placeholder of a stored graph, dynamic sizes being this one."""
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        shape, dtype = node.meta["spec"]
        shape = [size if isinstance(extent, str) else extent for extent in shape]
        if dtype.is_floating_point:
            value = torch.randn(shape) * (0.1 if node.meta["kind"] == "weight" else 1.0)
        else:
            value = torch.randint(0, 2, shape)
        values[node.name] = value.to(dtype)
    return values
