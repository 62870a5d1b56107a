from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from inlay.passes.fuse_rms_norm import fuse_rms_norm
from inlay.passes.graph import bind, calls
from tests.passes.graphs import DTYPES, export, refusals, rewrite

RMS_NORM = torch.ops.inlay.rms_norm.default
Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _normalise(x: torch.Tensor, power: float = 2, dim: int = -1, eps: float = 1e-5) -> torch.Tensor:
    x = x.to(torch.float32)
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps)


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * _normalise(x).to(x.dtype)


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (_normalise(x) * (1.0 + weight.float())).type_as(x)


def olmo(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight * _normalise(x)).to(x.dtype)


def unscaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _normalise(x).type_as(x)


def by_power(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5)
    return (normed * weight.float()).type_as(x)


def by_division(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    return weight * normed.to(x.dtype)


def by_reciprocal(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5).reciprocal()
    return weight * normed.to(x.dtype)


def by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (11,), weight, 1e-5)


class Norm(torch.nn.Module):
    def __init__(self, formula: Formula, size: int = 11) -> None:
        super().__init__()
        self.formula = formula
        self.weight = torch.nn.Parameter(1 + 0.3 * torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x, self.weight)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5, 11), (1, 5, 3, 11)], ids=["hidden", "heads"])
@pytest.mark.parametrize(
    ("formula", "offset", "in_float"),
    [
        (llama, 0.0, False),
        (gemma, 1.0, True),
        (olmo, 0.0, True),
        (unscaled, 0.0, False),
        (by_power, 0.0, True),
        (by_division, 0.0, False),
        (by_reciprocal, 0.0, False),
        (by_torch, 0.0, True),
    ],
)
def test_forms(
    formula: Formula, offset: float, in_float: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    gm, tensors = export(Norm(formula).to(dtype), torch.randn(shape, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_rms_norm)
    assert count == 1
    # Other spellings of the inverse root round it differently, by one part in 2^24.
    assert error == 0 or (formula in (by_power, by_division, by_reciprocal) and error < 2e-7)
    (norm,) = gm.graph.find_nodes(op="call_function", target=RMS_NORM)
    given = bind(norm)
    assert (given["weight"] is None) is (formula is unscaled)
    assert (given["eps"], given["weight_offset"]) == (1e-5, offset)
    # In float32 the place of the cast cannot be seen, and does not matter.
    seen = dtype != torch.float32 or offset == 1 or formula is by_torch
    assert given["scale_in_float"] is (in_float and seen)
    assert len(calls(gm, *{node.target for node in gm.graph.nodes})) == 1
    assert norm.meta["val"].dtype == dtype


@DTYPES
def test_norms_that_share_their_input(dtype: torch.dtype) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Norm(llama), Norm(llama)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) - self.b(x)

    gm, tensors = export(Two().to(dtype), torch.randn(1, 5, 11, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_rms_norm)
    assert (count, error) == (2, 0)
    assert len(calls(gm, torch.ops.aten.rsqrt.default)) == 0


@DTYPES
def test_a_norm_of_a_norm(dtype: torch.dtype) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = unscaled(x, x)
            return y + unscaled(y, y)

    gm, tensors = export(Two().to(dtype), torch.randn(1, 5, 11, dtype=dtype))
    assert rewrite(gm, tensors, fuse_rms_norm) == (2, 0.0)
    assert not calls(gm, torch.ops.aten.rsqrt.default, torch.ops.aten.to.dtype)


def wrong_mean(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * _normalise(x, dim=1).to(x.dtype)


def wrong_power(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * _normalise(x.abs(), power=3).to(x.dtype)


def no_epsilon(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def other_tensor(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def scaled_by_activation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.sin() * _normalise(x).to(x.dtype) + weight


def wider_result(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.double() * _normalise(x)


def in_low_precision(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def offset_in_low_precision(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (_normalise(x) * (1.0 + weight)).type_as(x)


def rounded_between(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * _normalise(x).to(torch.bfloat16).float()


def rounded_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.to(torch.bfloat16) * _normalise(x.to(torch.float16))).to(torch.float16)


def scaled_after_the_cast_in_float(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() * _normalise(x).to(x.dtype)).to(x.dtype)


@pytest.mark.parametrize(
    ("formula", "dtype", "reason"),
    [
        (wrong_mean, torch.float32, "mean is over dimensions"),
        (wrong_power, torch.float32, "exponent is 3"),
        (no_epsilon, torch.float32, "no constant epsilon"),
        (other_tensor, torch.float32, "not of the square of the tensor"),
        (no_epsilon, torch.bfloat16, "no constant epsilon"),
        (in_low_precision, torch.bfloat16, "computed in torch.bfloat16"),
    ],
)
def test_look_alikes(formula: Formula, dtype: torch.dtype, reason: str) -> None:
    gm, tensors = export(Norm(formula).to(dtype), torch.randn(1, 5, 11, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_rms_norm)
    assert (count, error) == (0, 0)
    assert re.search(reason, refusals(gm))


@pytest.mark.parametrize(
    ("formula", "dtype", "size"),
    [
        (scaled_after_the_cast_in_float, torch.bfloat16, 11),
        (offset_in_low_precision, torch.bfloat16, 11),
        (rounded_between, torch.float32, 11),
        (rounded_weight, torch.float32, 11),
        (wider_result, torch.float32, 11),
        (scaled_by_activation, torch.float32, 11),
        (scaled_by_activation, torch.bfloat16, 11),
        (llama, torch.float32, 1),
        (llama, torch.bfloat16, 1),
    ],
)
def test_other_factors_stay_outside(formula: Formula, dtype: torch.dtype, size: int) -> None:
    """The norm itself is fused; a factor that rounds elsewhere, or is no weight, is left."""
    gm, tensors = export(Norm(formula, size).to(dtype), torch.randn(1, 5, 11, dtype=dtype))
    assert rewrite(gm, tensors, fuse_rms_norm) == (1, 0.0)
    (norm,) = calls(gm, RMS_NORM)
    assert bind(norm)["weight"] is None
    assert len(calls(gm, torch.ops.aten.mul.Tensor)) == 1
