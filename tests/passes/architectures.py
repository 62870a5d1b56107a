"""Every toy architecture's captured graph, once for all tests of a process."""

from __future__ import annotations

import functools

import torch
from torch.fx import GraphModule

from inlay.lowering.capture import capture
from inlay.lowering.export import Captured
from inlay.passes.graph import copy_graph
from tests.passes.graphs import step_tensors
from tests.toys import ARCHITECTURES, ENCODERS, MULTIMODAL, build_toy

NAMES = sorted({**ARCHITECTURES, **ENCODERS, **MULTIMODAL})
MAX_TOKENS = 256


@functools.cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> Captured:
    """The capture of a name in tests/toys.py; its graph is shared: rewrite a copy."""
    return capture(build_toy(name, dtype), MAX_TOKENS, MAX_TOKENS)


def graph_and_tensors(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """A graph of one's own, and tensors for the placeholders it has before insert_paged_kv."""
    capture = captured(name, dtype)
    # No id beyond the smallest vocabulary of the toys.
    return copy_graph(capture.graph), {**capture.sources, **step_tensors(100)}
