"""Mixtures of experts against their references, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from inlay.backends.kernels.triton.experts import experts, quantized_experts
from inlay.backends.kernels.triton.moe import quantize_kernel, sort_kernel
from inlay.passes import quantized_ops as reference
from inlay.passes.check import relative_rms
from inlay.passes.experts_op import ACTIVATIONS
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from tests.kernels.interpreted import poisoned  # noqa: F401
from tests.passes.experts import LAYOUTS, Experts, make_experts

# Four roundings (both products, activation, result) of 0.3 units in the last place in the mean.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def run(case: Experts) -> torch.Tensor:
    return experts(*case.tensors, **case.options)


FEW = ("plain", "interleaved", "clamped", "normed")
"""Layouts that have each part between them, but for the few of which only an activation is new."""


def few_or_slow(name: str) -> Any:
    return pytest.param(name, marks=() if name in FEW else pytest.mark.slow)


@pytest.mark.parametrize("layout", map(few_or_slow, LAYOUTS))
def test_layouts(layout: str) -> None:
    dtype = torch.float16 if layout in ("plain", "interleaved") else torch.float32
    case = make_experts(dtype, num_experts=5, **LAYOUTS[layout])
    exact, out = case.in_float64(), run(case)
    assert out.dtype is dtype
    assert relative_rms(exact, out) < TOLERANCE[dtype]
    twins = [replace(case, top_k_index=case.top_k_index.roll(1, 0))]
    twins += [case.swapped()] if case.options.get("gated", True) else []
    for twin in twins:
        assert not relative_rms(exact, twin.in_float64()) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    case = make_experts(num_tokens=2, num_experts=4, top_k=2, activation=activation)
    assert relative_rms(case.in_float64(), run(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_sizes(num_tokens: int) -> None:
    """No token, one, and more to an expert than a tile has rows."""
    case = make_experts(num_tokens=num_tokens, num_experts=4, top_k=2)
    out = run(case)
    assert out.shape == case.x.shape
    if num_tokens:
        assert relative_rms(case.in_float64(), out) < TOLERANCE[torch.float32]


SCHEMES: list[tuple[str, Scheme, dict[str, Any]]] = [
    ("int8", Scheme("int8"), {}),
    ("int8", Scheme("int8"), {"interleaved": True, "bias": True}),
    ("fp8", Scheme("fp8"), {}),
    ("none", Scheme("int4", group_size=32), {"num_tokens": 3}),
    ("none", Scheme("int8", symmetric=False), {"num_tokens": 3}),
    ("none", Scheme("fp8"), {"num_tokens": 3}),
]


@pytest.mark.parametrize(("activations", "scheme", "options"), SCHEMES, ids=str)
def test_quantized(activations: str, scheme: Scheme, options: dict[str, Any]) -> None:
    """The same roundings as the reference, so float32's tolerance: a number on a tie that sums in
    another order send elsewhere would be seen, and none is here."""
    case = make_experts(num_experts=4, top_k=2, hidden=64, inner=32, **options)
    up, down = quantize_weight(case.up, scheme), quantize_weight(case.down, scheme)
    given = case.x, case.top_k_index, case.top_k_weights
    extras = case.up_bias, case.down_bias, None
    arguments = (*given, *up, *down, activations, *extras)
    expected = reference.quantized_experts(*arguments, **case.options)
    out = quantized_experts(*arguments, **case.options)
    assert relative_rms(expected, out) < TOLERANCE[torch.float32]
    unscaled = up[0], up[1] * 1.01, up[2]
    twin = reference.quantized_experts(
        *given, *unscaled, *down, activations, *extras, **case.options
    )
    assert relative_rms(expected, twin) > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantizers_equal_the_graphs(kind: str) -> None:
    """To the bit, but for what a NaN makes of its row: the scale is NaN, the numbers are unread."""
    x = torch.randn(9, 333) * torch.logspace(-6, 6, 9)[:, None]
    x[2], x[3], x[4, 5] = 0.0, 1e-35, float("nan")
    x[5, :8] = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 127.0, -127.0])  # ties
    x[5, 8:] = 0.0
    wanted = {"int8": reference.quantize_int8, "fp8": reference.quantize_fp8}[kind](x)
    q, scales = torch.empty(9, 333, dtype=wanted[0].dtype), torch.empty(9, 1)
    at = q.view(torch.uint8) if kind == "fp8" else q
    quantize_kernel[(9,)](x, at, scales, 333, 333, kind, 512)
    assert torch.equal(scales.nan_to_num(-1.0), wanted[1].nan_to_num(-1.0))
    sound = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(at[sound] & 0x7F, wanted[0].view(at.dtype)[sound] & 0x7F)  # -0 may be 0
    assert torch.equal(q[sound].float(), wanted[0][sound].float())


def test_every_e4m3_number_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    x = codes.view(reference.FP8).float()[~codes.view(reference.FP8).isnan()]
    q, scales = torch.empty(1, len(x), dtype=torch.uint8), torch.empty(1)
    quantize_kernel[(1,)](x, q, scales, len(x), len(x), "fp8", 256)
    assert float(scales) == 1.0
    assert torch.equal(q[0].view(reference.FP8).float(), x)


@pytest.mark.parametrize("num_pairs", [1, 5, 1000, 2600])
def test_sorting(num_pairs: int) -> None:
    """Stable; what is no expert is left out."""
    index = torch.randint(-1, 8, (num_pairs,))
    order = torch.full((num_pairs,), -1, dtype=torch.int32)
    offsets = torch.empty(8, dtype=torch.int32)
    sort_kernel[(7,)](index, order, offsets, num_pairs, 7, 1024)
    expected = [pair for e in range(7) for pair in (index == e).nonzero().flatten().tolist()]
    assert order[: len(expected)].tolist() == expected
    assert (order[len(expected) :] == -1).all()
    counts = torch.tensor([int((index == e).sum()) for e in range(7)])
    assert offsets.tolist() == [0, *counts.cumsum(0).tolist()]
