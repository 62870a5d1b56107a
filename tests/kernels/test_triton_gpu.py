"""The Triton products, experts and sampling on a GPU, against float64 and the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from inlay.passes import quantized_ops as reference
from inlay.passes.check import relative_rms
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from tests.passes.experts import LAYOUTS, make_experts

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROWS = (1, 16, 17, 64, 65, 300, 1025)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

# The result's rounding to bfloat16: at most 2^-8 of it, 1.66e-3 in the root mean square.
TOLERANCE = 2.0**-9
# Weights that are scaled and rounded, where a tile spans groups, add such an error: 2.34e-3, in
# float16 an eighth of that. Float32: sums of 4,096 terms in another order.
WEIGHT_ONLY = {BF16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}
# Four roundings of that kind: both products, the activation, the result.
EXPERTS_TOLERANCE = 8e-3


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    from inlay.backends.kernels.triton.register import register_cuda_kernels

    register_cuda_kernels()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that the next outputs are likely to get holds NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")
    yield
    torch.cuda.synchronize()


def cuda(*values: Any) -> list[Any]:
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in values]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(33, 100), (4096, 4096), (48, 16400)], ids=str)
def test_int8(shape: tuple[int, int], asymmetric: bool) -> None:
    """Exact sums; scaled, they are off by the rounding of fused multiplications at most."""
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    w_scale, bias = torch.rand(1, shape[0]), torch.randn(shape[0])
    for rows in ROWS:
        q = torch.randint(-128, 128, (rows, shape[1]), dtype=torch.int8)
        zero = torch.randint(-128, 128, (rows, 1), dtype=torch.int32) if asymmetric else None
        arguments = q, torch.rand(rows, 1), zero, weight, w_scale, bias, torch.float32
        out = torch.ops.inlay.int8_linear(*cuda(*arguments))
        assert relative_rms(reference.int8_linear(*arguments), out.cpu()) < 1e-7


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("columns", [4096, 4090])
def test_fp8(columns: int, groups: int) -> None:
    """4,096 columns with one scale go to torch._scaled_mm where there are rows enough."""
    depth = 4096
    scheme = Scheme("fp8", group_size=0 if groups == 1 else depth // groups)
    weight, w_scale, _ = quantize_weight(torch.randn(columns, depth), scheme)
    w_scales = w_scale.double().t().repeat_interleave(depth // groups, 1)
    wide = (weight.double() * w_scales).cuda()
    for rows in ROWS:
        q, x_scale = reference.quantize_fp8(torch.randn(rows, depth), depth // groups)
        x_scales = x_scale.double().repeat_interleave(depth // groups, -1)
        exact = (q.double() * x_scales).cuda() @ wide.t()
        out = torch.ops.inlay.fp8_linear(*cuda(q, x_scale, weight, w_scale, None, BF16))
        assert relative_rms(exact, out) < TOLERANCE


SCHEMES = [
    Scheme("int8"),
    Scheme("int8", group_size=32),
    Scheme("int8", group_size=128, symmetric=False),
    Scheme("int4", group_size=32),
    Scheme("int4", group_size=64, symmetric=False),
    Scheme("int4", group_size=128),
    Scheme("fp8"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_weight_only(scheme: Scheme, dtype: torch.dtype) -> None:
    columns, depth = 1000, 4096
    weight, scale, zero = quantize_weight(torch.randn(columns, depth) / depth**0.5, scheme)
    wide = reference.dequantize(weight, scale, zero).double().cuda()
    for rows in ROWS:
        x = torch.randn(rows, depth, device="cuda").to(dtype)
        out = torch.ops.inlay.weight_only_linear(x, *cuda(weight, scale, zero), None)
        assert relative_rms(x.double() @ wide.t(), out) < WEIGHT_ONLY[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 9, 500])
def test_experts(layout: str, num_tokens: int) -> None:
    sizes = {"num_tokens": num_tokens, "hidden": 264, "inner": 200}
    case = make_experts(BF16, **sizes, **LAYOUTS[layout])
    tensors = cuda(*case.tensors)
    torch.ops.inlay.experts(*tensors, **case.options)
    torch.cuda.set_sync_debug_mode("error")  # the host must not wait
    try:
        out = torch.ops.inlay.experts(*tensors, **case.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_rms(case.in_float64(), out.cpu()) < EXPERTS_TOLERANCE


@pytest.mark.parametrize(
    ("activations", "scheme"),
    [
        ("int8", Scheme("int8")),
        ("fp8", Scheme("fp8")),
        ("none", Scheme("int4", group_size=32)),
        ("none", Scheme("int8", symmetric=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_tokens", [1, 9, 500])
def test_quantized_experts(activations: str, scheme: Scheme, num_tokens: int) -> None:
    """Beside the reference in bfloat16: both round alike, but for numbers on a tie."""
    case = make_experts(BF16, num_tokens=num_tokens, hidden=256, inner=192)
    up, down = quantize_weight(case.up, scheme), quantize_weight(case.down, scheme)
    given = case.x, case.top_k_index, case.top_k_weights, *up, *down, activations
    expected = reference.quantized_experts(*given, **case.options)
    out = torch.ops.inlay.quantized_experts(*cuda(*given), **case.options)
    assert relative_rms(expected, out.cpu()) < EXPERTS_TOLERANCE


def test_sampling() -> None:
    """A token may differ from the CPU's where two are within 1e-6: one in 1,000 at most."""
    from inlay.backends.kernels.triton.sampling import draw_tokens
    from inlay.runtime.sampler import Sampler
    from tests.runtime.test_sampler import CPU, MIXED

    slots = np.arange(len(MIXED))
    samplers = Sampler(len(MIXED), torch.device("cuda")), Sampler(len(MIXED), CPU)
    assert samplers[0]._op is draw_tokens
    for slot, params in enumerate(MIXED):
        for sampler in samplers:
            sampler.set_slot(slot, params, params.seed or 0)
    logits = torch.randn(len(MIXED), 128_256) * 2
    different = 0
    for position in range(50):
        at = slots, np.full(len(slots), position)
        found = samplers[0].sample(logits.cuda(), *at).cpu()
        different += int((found != samplers[1].sample(logits, *at)).sum())
    assert different <= 50 * len(MIXED) / 1000


def test_nothing_is_compiled_after_warm_up() -> None:
    from inlay.backends.kernels.triton.compile_monitor import compilations
    from inlay.backends.kernels.triton.gemm_configs import ROWS as BUCKETS

    weight, scale, zero = cuda(*quantize_weight(torch.randn(512, 1024), Scheme("int4")))

    def product(rows: int) -> None:
        x = torch.randn(rows, 1024, device="cuda", dtype=BF16)
        torch.ops.inlay.weight_only_linear(x, weight, scale, zero, None)

    for rows in (*BUCKETS, BUCKETS[-1] + 1):
        product(rows)
    with compilations() as seen:
        for rows in (1, 2, 15, 17, 31, 33, 48, 100, 129, 300, 513, 2000):
            product(rows)
    assert not seen


def test_a_captured_product_can_be_replayed() -> None:
    """Its counters are zero again after each replay."""
    q, x_scale = reference.quantize_int8(torch.randn(3, 4096))
    weight = torch.randint(-128, 128, (512, 4096), dtype=torch.int8)
    arguments = cuda(q, x_scale, None, weight, torch.rand(1, 512), None, BF16)
    expected = torch.ops.inlay.int8_linear(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.inlay.int8_linear(*arguments)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
