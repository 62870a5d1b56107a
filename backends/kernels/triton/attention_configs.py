"""Tile shapes of the attention kernels: looked up by shape and device, never searched for.

A row serves what is no larger than it: `head` is the wider of the two head sizes, rounded up to a
power of two. The first row that fits is taken. Shared memory decides most of it: 227 KiB for one
program on Hopper and Blackwell's data-centre parts, 163 on A100, 99 elsewhere.

Chosen from the sizes of tiles, the registers of ahead-of-time compiles and what the field uses
(vLLM's and SGLang's Triton backends, FlashAttention's tiles); not yet measured on any GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """block_m: rows of queries (query heads of one KV head, for prefill times tokens); block_n:
    keys of one turn of the loop."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


LARGE, MEDIUM, SMALL = "227 KiB", "163 KiB", "99 KiB"
_SHARED = {80: MEDIUM, 87: MEDIUM, 90: LARGE, 100: LARGE, 103: LARGE, 110: LARGE}

# (kind, shared memory, bits of a product's operands, head) -> tiles
_TABLE: tuple[tuple[str, str, int, int, Tiles], ...] = (
    ("prefill", LARGE, 16, 64, Tiles(128, 128, 8, 3)),
    ("prefill", LARGE, 16, 128, Tiles(128, 64, 8, 3)),
    ("prefill", LARGE, 16, 256, Tiles(128, 64, 8, 2)),
    ("prefill", LARGE, 16, 512, Tiles(64, 32, 8, 2)),
    ("prefill", MEDIUM, 16, 64, Tiles(128, 64, 4, 3)),
    ("prefill", MEDIUM, 16, 128, Tiles(128, 64, 8, 2)),
    ("prefill", MEDIUM, 16, 256, Tiles(64, 32, 8, 2)),
    ("prefill", MEDIUM, 16, 512, Tiles(32, 16, 8, 2)),
    ("prefill", SMALL, 16, 64, Tiles(128, 64, 4, 2)),
    ("prefill", SMALL, 16, 128, Tiles(64, 32, 4, 2)),
    ("prefill", SMALL, 16, 256, Tiles(64, 32, 8, 1)),
    ("prefill", SMALL, 16, 512, Tiles(16, 16, 8, 1)),
    ("decode", LARGE, 16, 128, Tiles(64, 64, 4, 3)),
    ("decode", LARGE, 16, 256, Tiles(64, 64, 4, 2)),
    ("decode", LARGE, 16, 512, Tiles(32, 32, 4, 2)),
    ("decode", MEDIUM, 16, 128, Tiles(64, 64, 4, 2)),
    ("decode", MEDIUM, 16, 256, Tiles(64, 32, 4, 2)),
    ("decode", MEDIUM, 16, 512, Tiles(16, 16, 4, 2)),
    ("decode", SMALL, 16, 64, Tiles(64, 64, 4, 2)),
    ("decode", SMALL, 16, 128, Tiles(64, 32, 4, 2)),
    ("decode", SMALL, 16, 256, Tiles(32, 32, 4, 1)),
    ("decode", SMALL, 16, 512, Tiles(16, 16, 4, 1)),
)

# Products in float32 run without tensor cores, from registers: small tiles on every device.
_FLOAT32 = {
    "prefill": ((64, Tiles(32, 32, 4, 2)), (256, Tiles(16, 32, 4, 1)), (512, Tiles(16, 16, 4, 1))),
    "decode": ((64, Tiles(16, 32, 4, 2)), (256, Tiles(16, 32, 4, 1)), (512, Tiles(16, 16, 4, 1))),
}

MAX_HEAD = 512


def tiles_for(kind: str, capability: int, operand_bits: int, head: int) -> Tiles:
    """kind: "prefill" or "decode". head: at most MAX_HEAD, which callers have checked."""
    if operand_bits == 32:
        return next(tiles for widest, tiles in _FLOAT32[kind] if head <= widest)
    shared = _SHARED.get(capability, SMALL)
    return next(
        tiles
        for its_kind, its_shared, bits, widest, tiles in _TABLE
        if (its_kind, its_shared, bits) == (kind, shared, operand_bits) and head <= widest
    )
