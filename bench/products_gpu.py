"""Matrix products on a GPU at Llama-3.1-8B's shapes, narrow ones beside cuBLAS in bfloat16.

    python -m inlay.bench.products_gpu [--output FILE] [--seconds 240]

For each shape, number of rows and format: microseconds, GB/s of the weight as it is stored,
TFLOP/s. Formats are those of `--quantization`: "bfloat16" is torch's own product, the others our
ops (which take `torch._scaled_mm` where it serves). Results are compared with float32 first.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from inlay.bench import gpu
from inlay.passes import quantized_ops
from inlay.passes.check import relative_rms
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 64, 256, 2048)
FORMATS = {
    "bfloat16": None,
    "fp8": Scheme("fp8"),
    "w8a8": Scheme("int8"),
    "w8a16": Scheme("int8"),
    "w4a16": Scheme("int4", group_size=32),
}
TOLERANCE = 0.01
"""Of the same rounded numbers multiplied in float32: the result's own rounding, 2^-9, and that of
weights which are scaled before they are multiplied."""


@functools.lru_cache(maxsize=len(FORMATS))
def weight_of(
    kind: str, shape: tuple[int, int], device: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As it is stored, with its scales."""
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5
    scheme = FORMATS[kind]
    if scheme is None:
        return weight.bfloat16(), None
    stored, scale, zero = quantize_weight(weight, scheme)
    assert zero is None, "symmetric"
    return stored, scale


def products(
    kind: str, x: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor | None
) -> tuple[Callable[[], torch.Tensor], torch.Tensor, int]:
    """A call, what it should give in float32, and the bytes of its weight."""
    dtype, ops = x.dtype, torch.ops.inlay
    if scale is None:
        return lambda: F.linear(x, stored), x.float() @ stored.float().t(), stored.nbytes
    size = stored.nbytes + scale.nbytes
    wide = quantized_ops.dequantize(stored, scale, None).t()
    if kind in ("w8a16", "w4a16"):
        return (
            lambda: ops.weight_only_linear(x, stored, scale, None, None),
            x.float() @ wide,
            size,
        )
    if kind == "w8a8":
        q, row_scale = quantized_ops.quantize_int8(x)
        return (
            lambda: ops.int8_linear(q, row_scale, None, stored, scale, None, dtype),
            (q.float() * row_scale) @ wide,
            size,
        )
    q, row_scale = quantized_ops.quantize_fp8(x)
    return (
        lambda: ops.fp8_linear(q, row_scale, stored, scale, None, dtype),
        (q.float() * row_scale) @ wide,
        size,
    )


def measure(kind: str, shape: tuple[int, int], rows: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(rows, shape[1], device=device).bfloat16()
    call, expected, size = products(kind, x, *weight_of(kind, shape, device))
    error = relative_rms(expected, call())
    assert error < TOLERANCE, f"off by {error:.4f}"
    seconds = gpu.seconds_of(call, device)
    return {
        "shape": shape, "rows": rows, "format": kind, "error": error, "us": seconds * 1e6,
        "gb_s": size / seconds / 1e9, "tflop_s": 2 * rows * shape[0] * shape[1] / seconds / 1e12,
    }  # fmt: skip


def items(arguments: argparse.Namespace) -> Iterator[gpu.Item]:
    device = arguments.device
    shapes = SHAPES
    if device == "cuda":
        from inlay.backends.kernels.triton.register import register_cuda_kernels

        register_cuda_kernels()
    else:
        shapes = {"small": (96, 64)}
    yield "read probe", lambda: {"read_gb_s": gpu.read_bandwidth(device) / 1e9}
    for name, shape in shapes.items():
        for kind in FORMATS:
            for rows in ROWS:
                yield f"{name} {rows} rows {kind}", partial(measure, kind, shape, rows, device)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    gpu.add_arguments(parser, seconds=240)
    arguments = parser.parse_args()
    return gpu.run_items("products_gpu", items(arguments), arguments)


if __name__ == "__main__":
    gpu.exit_with(main)
