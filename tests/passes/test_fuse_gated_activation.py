from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from inlay.passes.canonicalise import canonicalise
from inlay.passes.fuse_gated_activation import fuse_gated_activation
from inlay.passes.graph import calls
from inlay.passes.ops import ACTIVATIONS
from tests.passes.graphs import DTYPES, ROUNDING, export, refusals, rewrite, targets

aten = torch.ops.aten
GATED = torch.ops.inlay.gated.default
Activation = Callable[[torch.Tensor], torch.Tensor]


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_bloom(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def gelu_erf(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def silu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


def relu2_by_hand(x: torch.Tensor) -> torch.Tensor:
    active = F.relu(x)
    return active * active


def mish_by_hand(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tanh(F.softplus(x))


def silu_in_float(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x.float()).to(x.dtype)


class GatedMLP(torch.nn.Module):
    def __init__(self, activation: Activation, one_matrix: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = torch.nn.Linear(6, 14) if one_matrix else None
        self.gate, self.up = torch.nn.Linear(6, 7), torch.nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_up is not None:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return up * self.activation(gate)
        return self.activation(self.gate(x)) * self.up(x)


@DTYPES
@pytest.mark.parametrize("one_matrix", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, one_matrix: bool, dtype: torch.dtype) -> None:
    module = GatedMLP(ACTIVATIONS[name], one_matrix).to(dtype)
    gm, tensors = export(module, torch.randn(1, 5, 6, dtype=dtype))
    assert rewrite(gm, tensors, fuse_gated_activation) == (1, 0.0)
    (fused,) = calls(gm, GATED)
    assert fused.args[2] == name


@DTYPES
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (gelu_new, "gelu_tanh"),
        (gelu_fast, "gelu_tanh"),
        (gelu_bloom, "gelu_tanh"),
        (gelu_erf, "gelu"),
        (silu_by_hand, "silu"),
        (relu2_by_hand, "relu2"),
        (mish_by_hand, "mish"),
        (silu_in_float, "silu"),
    ],
)
def test_spellings(activation: Activation, name: str, dtype: torch.dtype) -> None:
    module = GatedMLP(activation, True).to(dtype)
    gm, tensors = export(module, torch.randn(1, 5, 6, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_gated_activation)
    assert count == 1
    # The op rounds once, where the spelling rounds after each of its steps.
    assert error <= ROUNDING[dtype]
    (fused,) = calls(gm, GATED)
    assert fused.args[2] == name


class LookAlike(torch.nn.Module):
    def __init__(self, formula: Activation) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x)


@DTYPES
@pytest.mark.parametrize(
    ("activation", "op"),
    [
        (gelu_new, aten.gelu.default),
        (gelu_erf, aten.gelu.default),
        (silu_by_hand, aten.silu.default),
        (mish_by_hand, aten.mish.default),
    ],
)
def test_canonicalise_names_an_activation(
    activation: Activation, op: torch._ops.OpOverload, dtype: torch.dtype
) -> None:
    x = torch.randn(1, 5, 6, dtype=dtype)
    gm, tensors = export(LookAlike(activation), x, canonical=False)
    count, error = rewrite(gm, tensors, canonicalise)
    assert count == 1
    assert error <= ROUNDING[dtype]
    assert targets(gm) == [str(op)]
    assert rewrite(gm, tensors, fuse_gated_activation) == (0, 0.0)


@pytest.mark.parametrize(
    "formula",
    [
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.05 * torch.pow(x, 3.0)))),
        lambda x: x * torch.sigmoid(1.5 * x),
        lambda x: x * torch.sigmoid(x + 0.1),
        lambda x: x * torch.tanh(x),
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.5)),
        lambda x: x[..., :1] * torch.sigmoid(x),
        lambda x: x.bfloat16() * torch.sigmoid(x),
        lambda x: x.long().clamp(min=0) * (x.long() ^ 3),
    ],
)
def test_other_functions_are_not_named(formula: Activation) -> None:
    gm, tensors = export(LookAlike(formula), torch.randn(1, 5, 6), canonical=False)
    before = targets(gm)
    rewrite(gm, tensors, canonicalise)
    assert not calls(gm, aten.gelu.default, aten.silu.default, aten.mish.default)
    assert sum("mul" in target for target in targets(gm)) == sum("mul" in t for t in before)


@pytest.mark.parametrize(
    ("formula", "refused"),
    [
        (lambda x: F.silu(x) * 2.0, True),
        (lambda x: F.silu(x) * x[..., :1], True),
        (lambda x: F.silu(x[:, :1]) * x, True),
        (lambda x: F.silu(x.bfloat16()) * x, True),
        (lambda x: F.silu(x) + x.sin(), False),
        (lambda x: F.elu(x) * x.sin(), False),
        (lambda x: F.silu(x).clamp(max=1.5) * x.sin(), False),
        (lambda x: x * torch.sigmoid(1.702 * x) + x.sin(), False),
    ],
)
def test_look_alikes(formula: Activation, refused: bool) -> None:
    gm, tensors = export(LookAlike(formula), torch.randn(1, 5, 6))
    count, error = rewrite(gm, tensors, fuse_gated_activation)
    assert (count, error) == (0, 0.0)
    assert ("gate and up differ" in refusals(gm)) is refused
