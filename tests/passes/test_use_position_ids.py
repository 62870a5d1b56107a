from __future__ import annotations

import torch

from inlay.passes.graph import calls
from inlay.passes.use_position_ids import ARANGES, use_position_ids
from tests.passes.graphs import export


class Learned(torch.nn.Module):
    """Embeds positions that it counts, from `start`, and leaves those of another size alone."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start
        self.table = torch.nn.Embedding(64, 6)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        torch._check(input_ids.shape[1] == position_ids.shape[1])
        counted = torch.arange(self.start, self.start + input_ids.shape[1])
        heads = torch.arange(3)
        return self.table(counted)[None] + heads.sum() + 0.0 * input_ids[..., None]


def counted(start: int) -> tuple[int, int]:
    """Rewrites made, and counts that are left."""
    row = torch.arange(9)[None]
    gm, _ = export(Learned(start), row, row)
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.meta.get("input") == "x1":
            node.meta["input"] = "position_ids"
    count = use_position_ids(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    if count:
        where = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
        table = torch.randn(64, 6)
        gm.recompile()
        output = gm(table, torch.zeros_like(where), where)
        output = output[0] if isinstance(output, tuple | list) else output
        torch.testing.assert_close(output, table[where] + 3.0)
    return count, len(calls(gm, *ARANGES))


def test_counted_positions_are_those_of_the_step() -> None:
    assert counted(0) == (1, 1)  # the heads are counted still


def test_a_count_that_does_not_begin_with_the_request_is_left() -> None:
    assert counted(5) == (0, 2)
