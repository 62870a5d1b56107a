"""Matrix products alone, in every format, beside oneDNN's and torch's own and the machine's limits.

    python -m inlay.bench.kernels_cpu products [--threads 2] [--repeats 20]

Each call's weight comes from memory: copies in turns, together larger than the last-level cache.
Outputs are compared with the reference first; what is compared runs in turns, the best counts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.bench.roofline import product_rate, read_bandwidth
from inlay.passes import quantized_ops as reference

ROWS = (1, 4, 16, 64, 512)
ROTATED_BYTES = 96 << 20
GROUP = 32
Product = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to multiply: how a weight [N, K] in bfloat16 is packed, and x [M, K] multiplied."""

    name: str
    bytes_per_weight: float
    pack: Callable[[Tensor], Any]
    call: Product
    tolerance: float = 2e-2


def integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and a scale for each output, float32 [1, N]."""
    scale = weight.float().abs().amax(1) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale[None]


def nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit numbers 0..15 [N, K] and bfloat16 scales [K / GROUP, N] of groups of inputs."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    numbers = (groups / scale.float()[..., None]).round().clamp(-8, 7).flatten(1) + 8
    return numbers.to(torch.uint8), scale.t().contiguous()


def variants() -> list[Variant]:
    """Ours, and what they stand beside."""
    ours, onednn, aten = torch.ops.inlay_cpu, torch.ops.onednn, torch.ops.aten
    mkldnn, bf16 = torch.ops.mkldnn, torch.bfloat16

    def pack_qlinear(w: Tensor) -> Any:
        q, scale = integers(w)
        zero = torch.zeros(len(q), dtype=torch.int32)
        return onednn.qlinear_prepack(q, None), scale[0], zero

    def qlinear(x: Any, w: Any) -> Tensor:  # one scale for all rows, which is less work
        return onednn.qlinear_pointwise(
            x[0], x[1], 128, w[0], w[1], w[2], None, 1.0, 0, bf16, "none", [], ""
        )

    def pack_int4(w: Tensor) -> Any:
        numbers, scale = nibbles(w)
        return ours.pack_weight_only(numbers[:, ::2] | numbers[:, 1::2] << 4), scale

    def pack_torch_int4(w: Tensor) -> Any:
        numbers, scale = nibbles(w)
        packed = aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        return packed, torch.stack((scale, torch.zeros_like(scale)), dim=2)

    def pack_fp8(w: Tensor) -> Any:
        q, scale = reference.quantize_fp8(w)
        return ours.pack_weight_only(q), scale.t().contiguous(), len(w)

    def pack_int8(w: Tensor) -> Any:
        q, scale = integers(w)
        return ours.pack_int8(q), scale

    def pack_weight_int8(w: Tensor) -> Any:
        q, scale = integers(w)
        return ours.pack_weight_only(q), scale

    def pack_torch_int8(w: Tensor) -> Any:
        q, scale = integers(w)
        return q, scale[0].bfloat16()

    def weight_only(x: Tensor, w: Any) -> Tensor:
        return ours.weight_only_linear(x, w[0], w[1], None, None, w[1].shape[1])

    return [
        Variant(
            "bf16", 2, lambda w: (ours.pack_linear(w), len(w)),
            lambda x, w: ours.linear(x, w[0], None, w[1]),
        ),
        Variant(
            "bf16 onednn", 2, mkldnn._reorder_linear_weight,
            lambda x, w: mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        ),
        Variant(
            "w8a8", 1, pack_int8,
            lambda x, w: ours.int8_linear(*x, None, w[0], w[1], None, w[1].shape[1], bf16),
        ),
        Variant("w8a8 onednn", 1, pack_qlinear, qlinear),
        Variant("int8", 1, pack_weight_int8, weight_only),
        Variant(
            "int8 torch", 1, pack_torch_int8,
            lambda x, w: aten._weight_int8pack_mm(x, w[0], w[1]),
        ),
        Variant("int4 group 32", 0.5 + 2 / GROUP, pack_int4, weight_only, 0.2),
        Variant(
            "int4 group 32 torch", 0.5 + 4 / GROUP, pack_torch_int4,
            lambda x, w: aten._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1]), 0.2,
        ),
        Variant("fp8", 1, pack_fp8, weight_only, 5e-2),
        Variant(
            "fp8 w8a8", 1, pack_fp8,
            lambda x, w: ours.fp8_linear(*x, w[0], w[1], None, w[2], bf16), 5e-2,
        ),
    ]  # fmt: skip


def inputs_of(variant: Variant, x: Tensor) -> Any:
    """x as this variant takes it: quantized before, outside of what is measured."""
    if variant.name == "w8a8":
        return reference.quantize_int8(x)
    if variant.name == "fp8 w8a8":
        return reference.quantize_fp8(x)
    if variant.name == "w8a8 onednn":
        scale = (x.float().abs().max() / 127).item()
        return (x.float() / scale).round().add(128).to(torch.uint8), scale
    return x


def bench_products(repeats: int, shape: tuple[int, int] = (9728, 896)) -> Iterator[dict[str, Any]]:
    """GB/s of weights (scales included) and GFLOP/s, with shares of what the machine can do."""
    outputs, width = shape
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    weight = torch.randn(shape).mul_(0.02).bfloat16()
    rate = product_rate(torch.bfloat16)
    packed: dict[str, list[Any]] = {}
    for variant in variants():
        copies = max(2, int(ROTATED_BYTES / (outputs * width * variant.bytes_per_weight)))
        packed[variant.name] = [variant.pack(weight) for _ in range(copies)]
    for rows in ROWS:
        x = torch.randn(rows, width).bfloat16()
        exact = x.double() @ weight.double().t()
        prepared = {v.name: inputs_of(v, x) for v in variants()}
        turns = {name: itertools.cycle(copies) for name, copies in packed.items()}
        best = dict.fromkeys(packed, float("inf"))
        read = 0.0
        for variant in variants():
            out = variant.call(prepared[variant.name], packed[variant.name][0]).double()
            error = ((out - exact).norm() / exact.norm()).item()
            assert error < variant.tolerance, f"{variant.name} differs by {error:.3f}"
        for _ in range(repeats):
            for variant in variants():
                argument, copy = prepared[variant.name], next(turns[variant.name])
                begin = clock()
                variant.call(argument, copy)
                best[variant.name] = min(best[variant.name], clock() - begin)
            read = max(read, read_bandwidth(1))
        for variant in variants():
            seconds = best[variant.name]
            num_bytes = outputs * width * variant.bytes_per_weight
            flops = 2 * rows * outputs * width
            yield {
                "bench": "products",
                "variant": variant.name,
                "rows": rows,
                "shape": list(shape),
                "us": round(seconds * 1e6, 1),
                "gb_s": round(num_bytes / seconds / 1e9, 1),
                "read_share": round(num_bytes / seconds / read, 2),
                "gflop_s": round(flops / seconds / 1e9),
                "bf16_rate_share": round(flops / seconds / rate, 2),
            }
