"""Machine code of the Triton kernels for GPUs that are not here: no spills, tensor cores used."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from inlay.backends.kernels.triton.experts import plan_mixture
from inlay.backends.kernels.triton.launch import Launch, Target
from inlay.backends.kernels.triton.products import FP8, Product, plan
from inlay.backends.kernels.triton.sampling import plan_draw
from tests.kernels.triton_aot import check_code, compile_launch

NUM_SMS = {80: 108, 90: 132, 100: 148}
BF16, INT8 = torch.bfloat16, torch.int8

FORMS: dict[str, tuple[torch.dtype, torch.dtype, int, bool]] = {
    "int8": (INT8, INT8, 1, False),
    "fp8": (FP8, FP8, 1, False),
    "fp8_groups": (FP8, FP8, 32, False),
    "w8": (BF16, INT8, 1, False),
    "w8_group64_zero": (BF16, INT8, 64, True),
    "w4_group32": (BF16, torch.uint8, 128, False),
    "w4_group64_zero": (BF16, torch.uint8, 64, True),
    "w4_group128": (BF16, torch.uint8, 32, False),
    "w4_group128_zero": (BF16, torch.uint8, 32, True),
    "wfp8": (BF16, FP8, 1, False),
    "w4_float16": (torch.float16, torch.uint8, 128, False),
    "w4_float32": (torch.float32, torch.uint8, 128, False),
}
"""Name -> x's and the weight's dtype, groups of K = 4096, zero points."""

FEW_ROWS = {
    ("int8", 80): "IMMA",
    ("int8", 90): "IGMMA",
    ("int8", 100): "IMMA",  # tcgen05 has none that Triton would use
    ("fp8", 80): "HMMA",  # widened: no e4m3 before sm_89
    ("fp8", 90): "QGMMA",
    ("fp8", 100): "UTCQMMA",
}


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(form: str, rows: int, capability: int) -> Launch:
    x_dtype, dtype, groups, has_zero = FORMS[form]
    columns, depth = 4096, 4096
    packed = 2 if dtype == torch.uint8 else 1
    narrow = x_dtype in (INT8, FP8)
    scale_dtype = BF16 if packed == 2 else torch.float32
    return plan(
        Product(
            empty(rows, depth, dtype=x_dtype),
            empty(columns, depth // packed, dtype=dtype),
            empty(rows, columns, dtype=BF16 if narrow else x_dtype),
            empty(rows, groups, dtype=torch.float32) if narrow else None,
            None,
            empty(groups, columns, dtype=scale_dtype),
            empty(groups, columns, dtype=dtype) if has_zero else None,
        ),
        Target(capability, NUM_SMS[capability]),
    )


def wanted(form: str, capability: int) -> tuple[str, ...]:
    if form == "w4_float32":
        return ()
    wide = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[capability]
    return (FEW_ROWS.get((form.partition("_")[0], capability), wide),)


@pytest.mark.parametrize(
    ("form", "rows", "capability"),
    [("int8", 1, 80), ("fp8", 1, 90), ("fp8", 100, 90), ("w4_group32", 1, 90), ("w8", 1, 100)],
)
def test_products(form: str, rows: int, capability: int) -> None:
    code = compile_launch(product(form, rows, capability), capability)
    check_code(code, capability, *wanted(form, capability))


@pytest.mark.slow
@pytest.mark.parametrize("capability", NUM_SMS)
@pytest.mark.parametrize("rows", [1, 32, 64, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_all_products(form: str, rows: int, capability: int) -> None:
    code = compile_launch(product(form, rows, capability), capability)
    check_code(code, capability, *wanted(form, capability))


OPTIONS = {
    "activation": "silu",
    "gated": True,
    "interleaved": False,
    "alpha": 1.0,
    "gate_limit": 0.0,
    "up_limit": 0.0,
    "limit_activated": False,
    "up_offset": 0.0,
    "gate_softcap": 0.0,
    "up_softcap": 0.0,
    "norm_eps": 0.0,
}


def mixture(weight: torch.dtype, activations: str, tokens: int, capability: int) -> list[Launch]:
    """Qwen3-30B-A3B's experts."""
    num_experts, hidden, inner, top_k = 128, 2048, 768, 8
    packed = 2 if weight == torch.uint8 else 1

    def matrix(columns: int, depth: int) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        numbers = empty(num_experts, columns, depth // packed, dtype=weight)
        groups = depth // 32 if packed == 2 else 1
        scales = empty(num_experts, groups, columns, dtype=torch.float32)
        return numbers, None if weight == BF16 else scales, None

    return plan_mixture(
        empty(tokens, hidden),
        empty(tokens, top_k, dtype=torch.int64),
        empty(tokens, top_k),
        (matrix(2 * inner, hidden), matrix(hidden, inner)),
        activations,
        (None, None, None),
        OPTIONS,
        empty(tokens, hidden),
        Target(capability, NUM_SMS[capability]),
    )


MIXTURES = [(BF16, "none"), (INT8, "int8"), (FP8, "fp8"), (torch.uint8, "none")]


def check_mixture(weight: torch.dtype, activations: str, tokens: int, capability: int) -> None:
    launches = mixture(weight, activations, tokens, capability)
    names = [launch.kernel.fn.__name__ for launch in launches]
    quantize = [] if activations == "none" else ["quantize_kernel"]
    around = ["sort_kernel", *quantize, "gemm_kernel", "activate_kernel", "gemm_kernel"]
    assert names == [*around, "combine_kernel"]
    for name, launch in zip(names, launches, strict=True):
        code = compile_launch(launch, capability)
        form = activations if activations != "none" else "w4"
        check_code(code, capability, *(wanted(form, capability) if name == "gemm_kernel" else ()))


def test_a_mixture_of_experts() -> None:
    check_mixture(FP8, "fp8", 1, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", NUM_SMS)
@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize(("weight", "activations"), MIXTURES, ids=str)
def test_mixtures_of_experts(
    weight: torch.dtype, activations: str, tokens: int, capability: int
) -> None:
    check_mixture(weight, activations, tokens, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", NUM_SMS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_sampling(dtype: torch.dtype, capability: int) -> None:
    rows = empty(3, dtype=torch.int64), empty(3, dtype=torch.int64)
    state = empty(3, 64, dtype=torch.int64), empty(4, 64, dtype=torch.float64)
    found = empty(3, dtype=torch.int64), empty(3, dtype=torch.float32)
    launch = plan_draw(empty(3, 128256, dtype=dtype), *rows, *state, *found)
    check_code(compile_launch(launch, capability), capability)


def test_spilling_code_is_seen() -> None:
    """A tile too large for the registers of 4 warps."""
    launch = product("w8", 1000, 80)
    large = Launch(launch.kernel, launch.grid, launch.args, 2, 2)
    with pytest.raises(AssertionError, match="spilled"):
        check_code(compile_launch(large, 80), 80)
