from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from inlay.passes.fuse_layer_norm import fuse_layer_norm
from inlay.passes.fuse_rms_norm import fuse_rms_norm
from inlay.passes.graph import bind, calls
from tests.passes.graphs import DTYPES, ROUNDING, export, refusals, rewrite

LAYER_NORM = torch.ops.inlay.layer_norm.default
Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _centred(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return x - x.mean(dim, keepdim=True)


def _normalise(x: torch.Tensor, power: float = 2, dim: int = -1, eps: float = 1e-5) -> torch.Tensor:
    centred = _centred(x)
    return centred * torch.rsqrt(centred.pow(power).mean(dim, keepdim=True) + eps)


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (11,), weight, bias, 1e-5)


def no_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (11,), weight, None, 1e-5)


def olmo(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), (11,), None, None, 1e-5).to(x.dtype)


def nemotron(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (11,), weight + 1.0, bias, 1e-5)


def in_float(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), (11,), weight.float(), bias.float(), 1e-5).to(x.dtype)


def cohere(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (weight.float() * _normalise(x.float())).to(x.dtype)


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    variance = wide.var(-1, unbiased=False, keepdim=True)
    normed = (wide - wide.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def by_correction(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    variance = wide.var(-1, correction=0, keepdim=True)
    normed = (wide - wide.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)
    return (normed * weight.float() + bias.float()).to(x.dtype)


class Norm(torch.nn.Module):
    def __init__(self, formula: Formula, size: int = 11) -> None:
        super().__init__()
        self.formula = formula
        self.weight = torch.nn.Parameter(1 + 0.3 * torch.randn(size))
        self.bias = torch.nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x, self.weight, self.bias)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 5, 11), (1, 5, 3, 11)], ids=["hidden", "heads"])
@pytest.mark.parametrize(
    ("formula", "parts", "offset"),
    [
        (plain, ("weight", "bias"), 0.0),
        (no_bias, ("weight", None), 0.0),
        (olmo, (None, None), 0.0),
        (nemotron, ("weight", "bias"), 1.0),
        (in_float, ("weight", "bias"), 0.0),
        (cohere, ("weight", None), 0.0),
        (by_hand, ("weight", "bias"), 0.0),
        (by_correction, ("weight", "bias"), 0.0),
    ],
)
def test_forms(
    formula: Formula,
    parts: tuple[str | None, str | None],
    offset: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    gm, tensors = export(Norm(formula).to(dtype), 3 + torch.randn(shape).to(dtype))
    count, error = rewrite(gm, tensors, fuse_layer_norm)
    assert count == 1
    # By hand, and in bfloat16 by torch's own kernel, the sums are taken in another order.
    exact = formula in (plain, no_bias, nemotron)
    assert error <= (0 if exact else ROUNDING[dtype])
    (norm,) = calls(gm, LAYER_NORM)
    given = bind(norm)
    assert (given["eps"], given["weight_offset"]) == (1e-5, offset)
    found = (given[key] and given[key].meta["weight"] for key in ("weight", "bias"))
    assert tuple(found) == parts
    assert len(calls(gm, *{node.target for node in gm.graph.nodes})) == 1
    assert norm.meta["val"].dtype == dtype


def narrow_factor(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return weight * _normalise(x.float()).to(x.dtype) + bias


def offset_in_float(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return ((1 + weight.float()) * _normalise(x.float())).to(x.dtype)


def wide_result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (weight.float() * _normalise(x.float())).sin().to(x.dtype)


def other_factor(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (x.float().sin() * _normalise(x.float())).to(x.dtype)


@pytest.mark.parametrize(
    ("formula", "weight"),
    [(narrow_factor, None), (offset_in_float, None), (wide_result, "to"), (other_factor, None)],
)
def test_other_roundings_stay_outside(formula: Formula, weight: str | None) -> None:
    """The norm itself is fused; what is rounded elsewhere than the op would is left."""
    gm, tensors = export(Norm(formula).bfloat16(), 3 + torch.randn(1, 5, 11).bfloat16())
    count, error = rewrite(gm, tensors, fuse_layer_norm)
    assert count == 1
    assert error <= ROUNDING[torch.bfloat16]
    (norm,) = calls(gm, LAYER_NORM)
    assert (norm.args[1] and norm.args[1].name.rstrip("_0123456789")) == weight


def wrong_mean(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = _centred(x, dim=1)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def wrong_variance(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _normalise(x, dim=1)


def corrected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)


def cubed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _normalise(x, power=3, eps=9.0)


def no_epsilon(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _centred(x) * torch.rsqrt(_centred(x).pow(2).mean(-1, keepdim=True))


def twice_the_mean(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = torch.sub(x, x.mean(-1, keepdim=True), alpha=2)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def narrow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _normalise(x.bfloat16())


def two_dimensions(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x[..., None].expand(-1, -1, -1, 3), (11, 3), None, None, 1e-5)


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        (wrong_mean, "mean is over dimensions"),
        (wrong_variance, "mean is over dimensions"),
        (corrected, "uncorrected"),
        (cubed, "exponent is 3"),
        (no_epsilon, "no constant epsilon"),
        (twice_the_mean, "a multiple of the mean"),
        (narrow, "computed in torch.bfloat16"),
        (two_dimensions, r"over dimensions \[11, 3\]"),
    ],
)
def test_look_alikes(formula: Formula, reason: str) -> None:
    gm, tensors = export(Norm(formula), torch.randn(1, 5, 11))
    assert rewrite(gm, tensors, fuse_layer_norm) == (0, 0.0)
    assert re.search(reason, refusals(gm))


def test_a_norm_without_a_mean_is_not_one() -> None:
    def rms(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    gm, tensors = export(Norm(rms), torch.randn(1, 5, 11))
    assert rewrite(gm, tensors, fuse_layer_norm) == (0, 0.0)
    assert rewrite(gm, tensors, fuse_rms_norm) == (1, 0.0)
