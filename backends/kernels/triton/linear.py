"""Linear layers with narrow weights on CUDA: which product serves, PyTorch's own or ours.

Each function is the CUDA implementation of the op of its name, see `passes/quantized_ops.py`.

- e4m3 times e4m3 with many rows goes to `torch._scaled_mm`, which rescales its sums in float32
  (`use_fast_accum=False`: the fast way keeps about 14 bits of them) and needs K and N in multiples
  of 16, bfloat16 out, and a scale for each row and column; with few rows to our kernel, which
  splits K, and so do other dtypes, other sizes and groups of inputs.
- int8 times int8 is ours for all sizes: `torch._int_mm` needs more than 16 rows and multiples of 8,
  and writes its int32 sums, which are then read again to be scaled: at 2,048 rows of [8192, 2048]
  these bytes take an H200 about as long as the product itself.
- weight-only products are ours.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from inlay.backends.kernels.triton.launch import Target, target_of
from inlay.backends.kernels.triton.products import Product, run
from inlay.passes import quantized_ops

SCALED_MM_ROWS = 64
"""More rows than these go to `torch._scaled_mm`. By its tiles, not measured: of 64 or more rows and
all of K, they leave most of a GPU idle where there are few."""

SCALED_MM_CAPABILITIES = (89, 90, 100, 103)
"""Where torch 2.11 has its product with a scale for each row and column."""


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def int8_linear(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows = as_rows(q)
    product = Product(
        rows,
        weight,
        rows.new_empty(len(rows), len(weight), dtype=dtype),
        x_scale.reshape(-1, 1),
        None if x_zero is None else x_zero.reshape(-1),
        w_scale.contiguous(),
        bias=bias,
    )
    return _run(product).view(*q.shape[:-1], len(weight))


def fp8_linear(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    rows = as_rows(q)
    x_scale = x_scale.reshape(-1, x_scale.shape[-1])
    if serves_scaled_mm(rows, weight, w_scale, bias, dtype, target_of(q.device)):
        # A scale of one for all rows is spread: both operands must be scaled in one way.
        by_row = x_scale.expand(len(rows), 1).contiguous()
        out = torch._scaled_mm(
            rows, weight.t(), by_row, w_scale.contiguous(), bias=bias, out_dtype=dtype
        )
        return out.view(*q.shape[:-1], len(weight))
    if not are_groups_served(weight.shape[1], w_scale.shape[0]):
        return quantized_ops.fp8_linear(q, x_scale, weight, w_scale, bias, dtype)
    out = rows.new_empty(len(rows), len(weight), dtype=dtype)
    product = Product(rows, weight, out, x_scale, w_scale=w_scale.contiguous(), bias=bias)
    return _run(product).view(*q.shape[:-1], len(weight))


def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    rows = as_rows(x)
    if not are_groups_served(rows.shape[1], scale.shape[0]):
        return quantized_ops.weight_only_linear(x, weight, scale, zero, bias)
    out = rows.new_empty(len(rows), len(weight))
    zero = None if zero is None else zero.contiguous()
    product = Product(rows, weight, out, w_scale=scale.contiguous(), w_zero=zero, bias=bias)
    return _run(product).view(*x.shape[:-1], len(weight))


def serves_scaled_mm(
    rows: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    target: Target,
) -> bool:
    """Whether `torch._scaled_mm` can do this product with a scale for each row and column, and
    has rows enough to be the faster."""
    columns, depth = weight.shape
    return (
        len(rows) > SCALED_MM_ROWS
        and target.capability in SCALED_MM_CAPABILITIES
        and w_scale.shape[0] == 1
        and dtype == torch.bfloat16
        and (bias is None or bias.dtype == torch.bfloat16)
        and columns % 16 == 0
        and depth % 16 == 0
        and rows.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
        and weight.is_contiguous()
    )


def are_groups_served(depth: int, num_groups: int) -> bool:
    """Tensor cores sum over 32 narrow numbers at once, so a group must hold a multiple of that;
    all that `QuantizationConfig` makes do, other checkpoints' are computed by the reference."""
    return num_groups == 1 or (depth // num_groups) % 32 == 0


def as_rows(x: Tensor) -> Tensor:
    """[..., K] to [M, K], each row contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run(product: Product) -> Tensor:
    device = product.x.device
    return run(product, target_of(device), device_name(device))
