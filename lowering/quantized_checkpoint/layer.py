"""One quantized weight: as a format stores it, and in the parts that our ops take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.passes.quantize.config import NONE, Scheme
from inlay.passes.quantize.rounding import pack
from inlay.passes.quantized_ops import dequantize

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale where not all do; multiples of the last are split into it."""

ROWS_AT_ONCE = 1 << 20
"""Elements of a weight that are widened to float32 at once, in each of the loader's threads."""


@dataclass
class Stored:
    """What any of the formats says about a weight [N, K].

    numbers: [N, K] int8, float8_e4m3fn, or uint8 0..15 for int4. scales: [G, N]. zeros: [G, N] of
    the numbers' dtype, None where 0 (int4: 8). group_size: inputs of a group, the last of which
    may be shorter; 0 for all. groups: int64 [K], the group of each input where they do not lie
    one after the other. activation, input_scale [1], input_zero [1], activation_symmetric,
    per_tensor: as in a Scheme and a Plan.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group_size: int = 0
    groups: Tensor | None = None
    activation: str = NONE
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    activation_symmetric: bool = True
    per_tensor: bool = False

    @property
    def kind(self) -> str:
        return {torch.uint8: "int4", torch.int8: "int8"}.get(self.numbers.dtype, "fp8")

    def group_of(self) -> Tensor:
        """int64 [K]."""
        if self.groups is not None:
            return self.groups.long()
        size = self.numbers.shape[1]
        return torch.arange(size) // (self.group_size or size)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight that the numbers stand for, by the formats' common arithmetic."""
        groups, offset = self.group_of(), 8 if self.kind == "int4" else 0
        out = torch.empty(self.numbers.shape, dtype=dtype)
        for rows in _row_chunks(self.numbers.shape):
            wide = self.numbers[rows].float()
            zeros = self.zeros
            wide -= offset if zeros is None else zeros[:, rows].float().t()[:, groups]
            out[rows] = wide * self.scales[:, rows].float().t()[:, groups]
        return out


@dataclass
class Layer:
    """scheme and parts (values, scales, zeros, input_scale ..., see passes/quantize/plan.py) of a
    weight, by which our ops give exactly what is stored."""

    scheme: Scheme
    parts: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight that the parts stand for: [N, K]."""
        values, order = self.parts["values"][rows], self.parts.get("order")
        width = 2 if self.scheme.weight == "int4" else 1
        out = torch.empty(values.shape[0], values.shape[1] * width, dtype=dtype)
        scales, zeros = self.parts["scales"][:, rows], self.parts.get("zeros")
        zeros = None if zeros is None else zeros[:, rows]
        for chunk in _row_chunks(out.shape):
            few = None if zeros is None else zeros[:, chunk]
            wide = dequantize(values[chunk], scales[:, chunk], few)
            out[chunk] = wide if order is None else wide[:, order.argsort()]
        return out


def _row_chunks(shape: torch.Size) -> Iterator[slice]:
    step = max(ROWS_AT_ONCE // max(shape[1], 1), 1)
    for begin in range(0, shape[0], step):
        yield slice(begin, begin + step)


def to_layer(stored: Stored) -> Layer | str:
    """The parts of a stored weight; or why no op of ours takes it."""
    size, groups = stored.numbers.shape[1], stored.group_of()
    scales, zeros, order = stored.scales, stored.zeros, None
    if len(scales) > 1:
        sizes = set(torch.bincount(groups, minlength=len(scales)).tolist())
        if sizes != {size // len(scales)}:
            return f"{size} inputs are not {len(scales)} groups of one size"
        if not bool((groups.diff() >= 0).all()):
            order = groups.argsort(stable=True)
    group = 0 if len(scales) == 1 else size // len(scales)
    if group > GROUP_SIZES[-1] and group % GROUP_SIZES[-1] == 0:
        times, group = group // GROUP_SIZES[-1], GROUP_SIZES[-1]
        scales = scales.repeat_interleave(times, 0)
        zeros = None if zeros is None else zeros.repeat_interleave(times, 0)
    if group not in (0, *GROUP_SIZES):
        return f"{group} inputs share a scale, kernels take {', '.join(map(str, GROUP_SIZES))}"
    if stored.kind == "int4" and size % 2:
        return f"{size} inputs are not an even number"
    scheme = Scheme(
        stored.kind,
        stored.activation,
        group,
        symmetric=zeros is None,
        per_tensor=stored.per_tensor,
        static=stored.input_scale is not None,
        activation_symmetric=stored.activation_symmetric,
    )
    numbers = stored.numbers if order is None else _columns(stored.numbers, order)
    if stored.activation != NONE:
        scales = scales.float()
    parts = {
        "values": pack(numbers, scheme).contiguous(),
        "scales": scales.contiguous(),
        "zeros": None if zeros is None else zeros.contiguous(),
        "order": order,
        "input_scale": stored.input_scale,
        "input_zero": stored.input_zero,
    }
    return Layer(scheme, {name: part for name, part in parts.items() if part is not None})


def _columns(numbers: Tensor, order: Tensor) -> Tensor:
    # Indexing is not there for float8.
    return numbers.view(torch.uint8)[:, order].view(numbers.dtype)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [.., C] to the uint8 numbers [.., C * 32 / bits] in it, lowest bits first; 4 or 8."""
    octets = words.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def signed(numbers: Tensor, bits: int) -> Tensor:
    """Unsigned numbers as our ops take them: int4 as they are, 8 bits with 128 taken away."""
    return numbers if bits == 4 else (numbers ^ 128).view(torch.int8)
