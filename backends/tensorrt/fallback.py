"""A segment that TensorRT cannot take, compiled by Inductor where it is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from inlay.backends.model import SegmentCall
from inlay.passes.ops import REFERENCES


def compiled(gm: GraphModule) -> SegmentCall:
    """A callable that takes weights then inputs; compiled at its first call, for all sizes."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.target = REFERENCES.get(node.target, node.target)
    gm.recompile()
    module = torch.compile(gm, dynamic=True)

    def call(args: list[torch.Tensor]) -> Any:
        return module(*args)

    return call
