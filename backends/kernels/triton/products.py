"""Plans one launch of the matrix product: which form, which tile, in how many parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.backends.kernels.triton.gemm import gemm_kernel
from inlay.backends.kernels.triton.gemm_configs import find_tile, split
from inlay.backends.kernels.triton.launch import (
    Launch,
    Target,
    is_interpreting,
    next_power_of_2,
)

FP8 = torch.float8_e4m3fn
MAX_TILES = 1 << 16
"""Of a product whose sum over K has parts; more tiles fill any GPU without."""

_counters: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Routing:
    """Which rows belong to which expert, see `experts.py`.

    order [T * K] int32: the pairs (token, choice) by expert; offsets [E + 1] int32.
    gather: choices that share a row of x, 0 where x has a row for each place in order.
    scatter: out has a row for each pair, else for each place in order.
    """

    order: Tensor
    offsets: Tensor
    gather: int
    scatter: bool


@dataclass(frozen=True)
class Product:
    """Operands of one product; see the ops in `passes/quantized_ops.py`.

    x [M, K]; weight [N, K] or uint8 [N, K / 2], with routing [E, N, K] of any strides; out [M, N].
    x_scale [M or 1, G or 1]; x_zero [M or 1]; w_scale and w_zero [G, N], [E, G, N].
    """

    x: Tensor
    weight: Tensor
    out: Tensor
    x_scale: Tensor | None = None
    x_zero: Tensor | None = None
    w_scale: Tensor | None = None
    w_zero: Tensor | None = None
    bias: Tensor | None = None
    routing: Routing | None = None

    @property
    def weight_kind(self) -> str:
        if self.weight.dtype == self.x.dtype:
            return "same"
        return {torch.int8: "int8", torch.uint8: "int4", FP8: "fp8"}[self.weight.dtype]

    @property
    def num_groups(self) -> int:
        return 1 if self.w_scale is None else self.w_scale.shape[-2]


def run(product: Product, target: Target, device_name: str = "") -> Tensor:
    """The product's out, filled."""
    if product.out.numel():
        plan(product, target, device_name).run()
    return product.out


def plan(product: Product, target: Target, device_name: str = "") -> Launch:
    """The kernel's launch; allocates what the parts of a sum are kept in."""
    x, weight, out = product.x, product.weight, product.out
    rows, (columns, depth) = out.shape[0], (weight.shape[-2], x.shape[1])
    kind = _x_kind(x, target)
    size = "float32" if x.dtype == torch.float32 else "wide" if kind == "float" else kind
    table = "narrow" if size in ("int8", "fp8") else size
    routing = product.routing
    num_experts = 0 if routing is None else weight.shape[0]
    rows_each = rows if routing is None else -(-rows // num_experts)
    tile = find_tile(table, target.capability, device_name, rows_each, columns, depth)
    group = depth // product.num_groups
    block_k, scale = _scaling(product, tile.block_k, group)
    tiles_m = -(-rows // tile.block_m) + min(num_experts, rows)
    tiles = tiles_m * -(-columns // tile.block_n)
    parts = 1 if routing is not None else split(tile, rows, columns, depth, target.num_sms)
    partials = counters = out
    if parts > 1:
        area = tiles * parts * tile.block_m * tile.block_n
        partials = out.new_empty(area, dtype=torch.int32 if kind == "int8" else torch.float32)
        counters = counters_of(out.device)
        assert tiles <= MAX_TILES, f"{tiles} tiles of a sum in {parts} parts"
    x_scale = product.x_scale
    bits = torch.uint8
    return Launch(
        gemm_kernel,
        (tiles, parts),
        {
            "x": x.view(bits) if kind == "bits" else x,
            "w": weight.view(bits) if weight.dtype == FP8 and kind != "fp8" else weight,
            "out": out,
            "x_scale": _or(x_scale, out),
            "x_zero": _or(product.x_zero, out),
            "w_scale": _or(product.w_scale, out),
            "w_zero": _or(product.w_zero, out),
            "bias": _or(product.bias, out),
            "partials": partials,
            "counters": counters,
            "order": out if routing is None else routing.order,
            "offsets": out if routing is None else routing.offsets,
            "num_rows": rows,
            "tiles_m": tiles_m,
            "num_experts": num_experts,
            "num_groups": product.num_groups,
            "N": columns,
            "K": depth,
            "stride_x": x.stride(0) if len(x) > 1 else depth,
            "stride_we": 0 if routing is None else weight.stride(0),
            "stride_wn": weight.stride(-2),
            "stride_wk": weight.stride(-1),
            "stride_out": out.stride(0),
            "stride_scale_row": _stride(x_scale, 0),
            "stride_scale_group": _stride(x_scale, 1),
            "stride_zero": _stride(product.x_zero, 0),
            "X": kind,
            "WEIGHT": "fp8" if kind == "bits" else product.weight_kind,
            "GROUP": group if product.num_groups > 1 else 0,
            "SCALE": scale,
            "HAS_BIAS": product.bias is not None,
            "HAS_X_ZERO": product.x_zero is not None,
            "HAS_W_ZERO": product.w_zero is not None,
            "EXPERTS": 0 if routing is None else next_power_of_2(num_experts),
            "GATHER": 0 if routing is None else routing.gather,
            "SCATTER": routing is not None and routing.scatter,
            "EVEN_K": depth % block_k == 0,
            "SPLIT_K": parts,
            "SWAP": tile.block_m < 64,
            "UPCAST": is_interpreting(),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": block_k,
        },
        tile.num_warps,
        tile.num_stages,
    )


def counters_of(device: torch.device) -> Tensor:
    """Zeros that products count their parts in, and leave as zeros: one after the other, so all
    products of a device must run in one stream's order. Made by the first, before any capture."""
    if device not in _counters:
        _counters[device] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    return _counters[device]


def _x_kind(x: Tensor, target: Target) -> str:
    if x.dtype == torch.int8:
        return "int8"
    if x.dtype == FP8:
        return "fp8" if target.capability >= 89 and not is_interpreting() else "bits"
    return "float"


def _scaling(product: Product, block_k: int, group: int) -> tuple[int, str]:
    """The tile's depth, no more than a group where groups' sums are scaled, and SCALE."""
    if product.w_scale is None:
        return block_k, ""
    if product.num_groups == 1:
        return block_k, "end"
    if group % block_k == 0:
        return block_k, "sum"
    if product.x_scale is None and block_k % group == 0:
        return block_k, "tile"
    largest = group & -group  # the largest power of two that divides it
    return min(block_k, largest), "sum"


def _or(values: Tensor | None, unread: Tensor) -> Tensor:
    """A kernel's pointers cannot be None where code that is left out mentions them."""
    return unread if values is None else values


def _stride(values: Tensor | None, dim: int) -> int:
    """0 where one value serves all."""
    if values is None or values.dim() <= dim or values.shape[dim] == 1:
        return 0
    return values.stride(dim)
