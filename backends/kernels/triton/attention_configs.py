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
    keys of one turn of the loop; masked_n: the same where prefill masks, a divisor of it."""

    block_m: int
    block_n: int
    masked_n: int
    num_warps: int
    num_stages: int


LARGE, MEDIUM, SMALL = "227 KiB", "163 KiB", "99 KiB"
_SHARED = {80: MEDIUM, 87: MEDIUM, 90: LARGE, 100: LARGE, 103: LARGE, 110: LARGE}
"""By compute capability; SMALL for others."""

# (kind, shared memory, cache: bits of a number, head) -> tiles. A loop's loads wait for the page
# table's, so that of 3 stages one tile, of 5 two are on their way.
_TABLE: tuple[tuple[str, str, int, int, Tiles], ...] = (
    ("prefill", LARGE, 16, 64, Tiles(128, 128, 64, 8, 3)),
    ("prefill", LARGE, 16, 128, Tiles(128, 128, 64, 8, 3)),
    ("prefill", LARGE, 16, 256, Tiles(128, 64, 32, 8, 3)),
    ("prefill", LARGE, 16, 512, Tiles(32, 32, 16, 8, 3)),
    ("prefill", LARGE, 8, 128, Tiles(128, 64, 32, 8, 3)),
    ("prefill", LARGE, 8, 256, Tiles(64, 64, 32, 8, 2)),
    ("prefill", LARGE, 8, 512, Tiles(32, 16, 16, 8, 3)),
    ("prefill", MEDIUM, 16, 64, Tiles(128, 64, 32, 4, 3)),
    ("prefill", MEDIUM, 16, 128, Tiles(64, 64, 32, 4, 3)),
    ("prefill", MEDIUM, 16, 256, Tiles(64, 32, 16, 8, 3)),
    ("prefill", MEDIUM, 16, 512, Tiles(32, 16, 16, 8, 3)),
    ("prefill", MEDIUM, 8, 128, Tiles(64, 32, 16, 4, 3)),
    ("prefill", MEDIUM, 8, 256, Tiles(64, 32, 16, 8, 3)),
    ("prefill", MEDIUM, 8, 512, Tiles(32, 16, 16, 8, 3)),
    ("prefill", SMALL, 16, 64, Tiles(128, 64, 32, 4, 3)),
    ("prefill", SMALL, 16, 128, Tiles(64, 64, 32, 4, 3)),
    ("prefill", SMALL, 16, 256, Tiles(64, 32, 16, 8, 3)),
    ("prefill", SMALL, 16, 512, Tiles(16, 16, 16, 8, 3)),
    ("prefill", SMALL, 8, 128, Tiles(64, 32, 16, 4, 3)),
    ("prefill", SMALL, 8, 256, Tiles(64, 32, 16, 8, 3)),
    ("prefill", SMALL, 8, 512, Tiles(16, 16, 16, 8, 3)),
    ("decode", LARGE, 16, 128, Tiles(64, 64, 64, 4, 5)),
    ("decode", LARGE, 16, 256, Tiles(32, 64, 64, 4, 3)),
    ("decode", LARGE, 16, 512, Tiles(16, 32, 32, 4, 3)),
    ("decode", LARGE, 8, 128, Tiles(64, 64, 64, 4, 5)),
    ("decode", LARGE, 8, 256, Tiles(32, 64, 64, 4, 3)),
    ("decode", LARGE, 8, 512, Tiles(16, 16, 16, 4, 3)),
    ("decode", MEDIUM, 16, 128, Tiles(64, 64, 64, 4, 3)),
    ("decode", MEDIUM, 16, 256, Tiles(32, 32, 32, 4, 3)),
    ("decode", MEDIUM, 16, 512, Tiles(16, 16, 16, 4, 3)),
    ("decode", MEDIUM, 8, 128, Tiles(64, 32, 32, 4, 3)),
    ("decode", MEDIUM, 8, 256, Tiles(32, 32, 32, 4, 3)),
    ("decode", MEDIUM, 8, 512, Tiles(16, 16, 16, 4, 3)),
    ("decode", SMALL, 16, 128, Tiles(64, 64, 64, 4, 3)),
    ("decode", SMALL, 16, 256, Tiles(32, 32, 32, 4, 3)),
    ("decode", SMALL, 16, 512, Tiles(16, 16, 16, 4, 3)),
    ("decode", SMALL, 8, 128, Tiles(64, 32, 32, 4, 3)),
    ("decode", SMALL, 8, 256, Tiles(32, 32, 32, 4, 3)),
    ("decode", SMALL, 8, 512, Tiles(16, 16, 16, 4, 3)),
)

# Products in float32 run without tensor cores, from registers: small tiles on every device.
_FLOAT32: dict[str, tuple[tuple[int, Tiles], ...]] = {
    "prefill": (
        (64, Tiles(16, 32, 32, 4, 3)),
        (512, Tiles(16, 16, 16, 4, 1)),
    ),
    "decode": (
        (64, Tiles(16, 32, 32, 4, 3)),
        (512, Tiles(16, 16, 16, 4, 1)),
    ),
}

MAX_HEAD = 512


def shared_bytes(capability: int) -> int:
    """What one program may have of shared memory."""
    return int(_SHARED.get(capability, SMALL).split()[0]) * 1024


def tiles_for(kind: str, capability: int, bits: int, head: int) -> Tiles:
    """kind: "prefill" or "decode". bits: of a number in the cache; 32 for products in float32.
    head: at most MAX_HEAD, which callers have checked."""
    if bits == 32:
        return next(tiles for widest, tiles in _FLOAT32[kind] if head <= widest)
    row = kind, _SHARED.get(capability, SMALL), bits
    return next(tiles for *its, widest, tiles in _TABLE if tuple(its) == row and head <= widest)
