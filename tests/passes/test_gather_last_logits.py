from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from inlay.passes.canonicalise import canonicalise
from inlay.passes.check import Check, relative_rms
from inlay.passes.gather_last_logits import gather_last_logits
from inlay.passes.graph import calls
from tests.passes.graphs import DTYPES, ROUNDING, capture_toy, export, refusals

ROWS = torch.tensor([4, 0, 4])


class Model(torch.nn.Module):
    """A head with two linear layers before the output; the last one is the LM head."""

    def __init__(self, end: Callable[[torch.Tensor], torch.Tensor], bias: bool = False) -> None:
        super().__init__()
        self.body = torch.nn.Linear(6, 7)
        self.lm_head = torch.nn.Linear(7, 9, bias=bias)
        self.end = end
        self.register_buffer("scale", torch.randn(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.lm_head(self.body(x).tanh())) * self.scale


@DTYPES
@pytest.mark.parametrize(
    "end",
    [lambda x: x, lambda x: (x / 30.0).tanh() * 30.0, lambda x: x.float() - 1],
    ids=["plain", "soft-cap", "cast"],
)
def test_rows_are_gathered_before_the_head(
    end: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    gm, tensors = export(Model(end, bias=True).to(dtype), torch.randn(1, 5, 6, dtype=dtype))
    check = Check({**tensors, "logits_indices": ROWS}.__getitem__, 0.0)
    before = check.run(gm)
    assert gather_last_logits(gm) == 1
    gm.graph.lint()
    after = check.run(gm)
    assert after.shape == (1, 3, 9)
    assert relative_rms(before[:, ROWS], after) <= ROUNDING[dtype]
    head = calls(gm, torch.ops.inlay.linear.default)[1]
    assert head.args[0].target is torch.ops.aten.index_select.default
    # Shapes downstream show the rows, those upstream the tokens.
    rows = head.args[0].args[2].meta["val"].shape[0]
    output = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes[0]
    assert str(output.meta["val"].shape[1]) == str(rows)
    assert str(head.args[0].args[0].meta["val"].shape[1]) != str(rows)


def test_soft_cap_of_a_real_model() -> None:
    gm, tensors = capture_toy("gemma2", torch.bfloat16)
    canonicalise(gm)
    check = Check(tensors.__getitem__, 0.0)
    before = check.run(gm)
    assert gather_last_logits(gm) == 1
    after = check.run(gm)
    assert after.shape[1] == 3 != before.shape[1]
    assert check.error(before, after) <= ROUNDING[torch.bfloat16]


@pytest.mark.parametrize(
    "end",
    [
        lambda x: x.softmax(-1),
        lambda x: x.cumsum(1),
        lambda x: x.flip(1),
        lambda x: x + x.sin(),
        lambda x: x * x.mean(1, keepdim=True),
    ],
    ids=["softmax", "cumsum", "flip", "branch", "mean"],
)
def test_what_is_not_known_to_be_token_wise_is_refused(
    end: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    gm, _ = export(Model(end), torch.randn(1, 5, 6))
    before = len(gm.graph.nodes)
    assert gather_last_logits(gm) == 0
    assert "not token-wise" in refusals(gm)
    assert len(gm.graph.nodes) == before


@pytest.mark.parametrize(("shape", "count"), [((1, 1, 9), 1), ((1, 5, 9), 0), ((5, 9), 0)])
def test_a_weight_for_each_position_is_refused(shape: tuple[int, ...], count: int) -> None:
    model = Model(lambda x: x)
    model.scale = torch.randn(shape)
    gm, _ = export(model, torch.randn(1, 5, 6), dynamic=False)
    assert gather_last_logits(gm) == count


def test_two_outputs_are_refused() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 7), torch.nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    gm, _ = export(Two(), torch.randn(1, 5, 6))
    assert gather_last_logits(gm) == 0
    assert "2 outputs" in refusals(gm)
