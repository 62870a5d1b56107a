"""Quantizers cost no pass over memory of their own: Inductor puts them into what comes before."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from inlay.passes.ops import REFERENCES

ops = torch.ops.inlay
rms_norm = REFERENCES[ops.rms_norm.default]
gated = REFERENCES[ops.gated.default]


def after_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-6)


def after_activation(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated(x, x * weight, "silu")


@pytest.mark.slow
@pytest.mark.parametrize("before", [after_norm, after_activation])
@pytest.mark.parametrize("name", ["quantize_int8", "quantize_int8_asymmetric", "quantize_fp8"])
def test_a_quantizer_is_part_of_the_kernel_before_it(
    before: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str
) -> None:
    quantize = REFERENCES[getattr(ops, name).default]

    def layer(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize(before(x, weight))

    x, weight = torch.randn(6, 96).bfloat16(), torch.randn(96).bfloat16()
    torch._dynamo.reset()
    given, (code,) = run_and_get_code(torch.compile(layer, dynamic=False), x, weight)
    kernels = set(re.findall(r"cpp_fused\w*", code))
    assert len({kernel for kernel in kernels if f"{kernel} = async_compile" in code}) == 1
    expected = layer(x, weight)
    # Where the code before is not rounded to bfloat16 first, a number may fall beyond a tie; so may
    # a zero point, and all numbers of its row with it: they are compared without.
    ours, theirs = (
        one[0].float() - (one[2] if "asymmetric" in name else 0) for one in (given, expected)
    )
    off = (ours - theirs).abs()
    assert float(off.max()) <= (1 if "int8" in name else 32)
    assert float((off > 0).float().mean()) < 0.2
