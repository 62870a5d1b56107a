"""Why a model is refused: the op and the line that mix tokens, and who is innocent."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.errors import UnsupportedModelError
from inlay.lowering import attention
from inlay.lowering.capture import build_shell, capture
from inlay.lowering.diagnose import explain_failure, find_mixing
from inlay.lowering.export import export_row
from inlay.passes.check import Check
from inlay.passes.graph import calls
from tests.passes.graphs import export
from tests.toys import build_toy

TOKENS = 11


class Layer(nn.Module):
    """Linear layers and a norm, which keep tokens apart, around a mixer."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.mixer = mixer

    def forward(self, ids: Tensor, where: Tensor) -> Tensor:
        return self.up(self.mixer(self.up(self.norm(self.embed(ids))), where))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=2, groups=8)

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Sum(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return x.cumsum(1)


class Mean(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Shift(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, :-1]], dim=1) + x


class Pad(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1)) + x


class Roll(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return x.roll(1, 1)


class Flip(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return x.flip(1)


class Sort(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return x.sort(1)[0]


class Product(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)) @ x


class Innocent(nn.Module):
    """Everything that decoders do to one token at a time, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(80, 8))

    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        angles = where[..., None].float() * torch.arange(4)
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, -1)
        x = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        x = x + self.table[where] * x.softmax(-1)
        x = x.view(1, -1, 2, 4).transpose(1, 2).transpose(1, 2).reshape(1, -1, 8)
        x = torch.cat([x, x[..., 8:]], -1)  # phi3 has an empty rest beside its rotary columns
        weights, experts = x.topk(2, -1)
        x = x.clone().mul_(2).scatter(-1, experts, weights) + torch.where(
            where[..., None] > 3, x, -x
        )
        q = k = v = x[0].view(-1, 2, 4)
        return torch.ops.inlay.attention(q, k, v, where[0], 0, 0.5).view(1, -1, 8)


def accused(mixer: nn.Module) -> str:
    inputs = torch.arange(TOKENS)[None] + 7, torch.arange(TOKENS)[None]
    gm, tensors = export(Layer(mixer), *inputs, canonical=False)
    return find_mixing(gm, Check(tensors.__getitem__, 0.0))


@pytest.mark.parametrize(
    ("kind", "op", "code"),
    [
        (Convolution, "aten.conv1d", "self.conv(x.transpose(1, 2))"),
        (Sum, "aten.cumsum", "x.cumsum(1)"),
        (Mean, "aten.mean", "x.mean(1, keepdim=True)"),
        (Shift, "aten.slice", "torch.cat([x[:, :1], x[:, :-1]], dim=1) + x"),
        (Pad, "aten.pad", "F.pad(x, (0, 0, 1, -1))"),
        (Roll, "aten.roll", "x.roll(1, 1)"),
        (Flip, "aten.flip", "x.flip(1)"),
        (Product, "aten.matmul", "(x @ x.transpose(1, 2))"),
    ],
)
def test_what_mixes_is_named_with_its_line(kind: type[nn.Module], op: str, code: str) -> None:
    found = accused(kind())
    assert found.startswith(f"op {op}.")
    assert "mixes tokens, from File" in found
    assert code in found
    assert "test_diagnose.py" in found
    assert "what would be needed" in found


def test_an_op_of_several_results_is_not_overlooked() -> None:
    assert "mixes tokens" in accused(Sort())


def test_the_innocent_are_not_accused() -> None:
    assert accused(Innocent()) == ""


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "gemma3n_text"])
def test_real_models_are_not_accused(name: str) -> None:
    captured = capture(build_toy(name), 64)
    assert calls(captured.graph, torch.ops.inlay.attention.default)
    row = {"input_ids": torch.arange(TOKENS)[None], "position_ids": torch.arange(TOKENS)[None]}
    check = Check(lambda key: row[key] if key in row else captured.sources[key], 0.0)
    assert find_mixing(captured.graph, check) == ""


MESSAGE = "too much\nof it\n  - a hint\n  - another"


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise ValueError(MESSAGE)
        return x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(*self.layers)(x)


def test_the_innermost_module_of_the_models_own_is_named() -> None:
    model = Outer()
    with pytest.raises(ValueError, match="too much") as caught:
        model(torch.ones(3))
    text = explain_failure(caught.value, model)
    assert text.startswith("it cannot be exported: module layers.1 (Inner) at ")
    assert "`raise ValueError(MESSAGE)`: ValueError" in text
    assert "ValueError: too much a hint; what would be needed" in text
    assert "another" not in text


def test_an_error_of_no_module_and_no_message() -> None:
    text = explain_failure(RuntimeError(), Outer())
    assert text.startswith("it cannot be exported: RuntimeError: no message; what would be needed")


@pytest.mark.parametrize("sizes", ["nonzero", "mask"])
def test_sizes_that_depend_on_numbers_are_refused(
    sizes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        rows = x[0]
        chosen = rows[rows[:, 0] > 0] if sizes == "mask" else rows[rows[:, 0].nonzero()[:, 0]]
        return x + chosen.sum(0)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    attention.register_attention()
    shell = build_shell(build_toy("llama", layers=1), attention.ATTENTION)
    with pytest.raises(
        UnsupportedModelError,
        match=r"module model\.layers\.0\.mlp gives a size that depends on the numbers of a run"
        r".*test_diagnose\.py.*what would be needed",
    ):
        export_row(shell, 64)
