"""The model captured, rewritten and cut once more, in memory, where nodes still know their source.

Lowering is deterministic, so the graphs are those the engine was built from; an artifact keeps
neither module paths nor source lines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule
from transformers import PreTrainedModel

from inlay.backends.program import Program
from inlay.lowering.capture import capture
from inlay.lowering.export import Captured
from inlay.lowering.partition import partition
from inlay.passes.graph import copy_graph
from inlay.passes.pass_manager import run_passes


@dataclass(frozen=True)
class Recaptured:
    """captured: before the passes. passed: after them. program, segments: cut from passed."""

    captured: Captured
    passed: Captured
    program: Program
    segments: dict[str, GraphModule]
    block_size: int
    max_seq_len: int

    @property
    def num_groups(self) -> int:
        return 1 + max(step.group for step in self.program.attention_steps)

    @property
    def windows(self) -> list[int]:
        """Tokens that queries look back on, of every window and chunk."""
        reaches = {n for step in self.program.attention_steps for n in (step.window, step.chunk)}
        return sorted(reaches - {0})


def recapture(
    model: PreTrainedModel, max_num_tokens: int, max_seq_len: int, block_size: int
) -> Recaptured:
    """Raises what capture, run_passes and partition raise."""
    captured = capture(model, max_num_tokens, max_seq_len)
    graph = captured.graph  # not the copy: names that passes give depend on a graph's history
    captured = replace(captured, graph=copy_graph(graph))
    run_passes(graph)
    dtype: torch.dtype = next(p.dtype for p in model.parameters())
    program, segments = partition(graph, dtype)
    passed = Captured(graph, captured.sources)
    return Recaptured(captured, passed, program, segments, block_size, max_seq_len)
