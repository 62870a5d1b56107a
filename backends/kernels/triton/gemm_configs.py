"""Tiles of the matrix product: looked up by device and shape, never searched for while serving.

TUNED holds what was measured, by the device's name; nothing has been yet. What it lacks takes
DEFAULT, chosen by arithmetic: enough bytes under way for the memory's latency (32 KiB a
multiprocessor on an H200), tiles that fit registers and shared memory on sm_80 and up.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """split_k: parts of K's sum; 0: as many as fill the device, see `split`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 0


ROWS = (16, 32, 64, 128, 256, 512)
"""Buckets of M. All sizes in one run the same code, in as many parts, and so do all above the last:
one product of each bucket, and one beyond, warm a weight's shape up."""

Key = tuple[str, int, int, int]
TUNED: dict[str, dict[Key, Tile]] = {}
"""Device name -> (kind, N, K, bucket of M as `bucket` has it) -> tile."""

DEFAULT: dict[str, tuple[Tile, ...]] = {
    # bfloat16 and float16, times themselves (experts) or what is widened to them
    "wide": (
        Tile(16, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(128, 128, 64, 8, 3),
    ),
    # int8 times int8, e4m3 times e4m3
    "narrow": (
        Tile(16, 64, 128, 4, 5),
        Tile(32, 64, 128, 4, 5),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 128, 128, 8, 3),
    ),
    # e4m3 activations where a GPU cannot multiply them
    "bits": (
        Tile(16, 64, 128, 4, 3),
        Tile(32, 64, 128, 4, 3),
        Tile(64, 64, 64, 8, 2),
        Tile(64, 64, 64, 8, 2),
    ),
    # float32, which has no tensor cores here: small tiles of plain multiplications
    "float32": (
        Tile(16, 32, 32, 4, 2),
        Tile(32, 32, 32, 4, 2),
        Tile(32, 32, 32, 4, 2),
        Tile(32, 32, 32, 4, 2),
    ),
    # sm_100's assembler spills some registers of the same tiles with half as many warps
    "wide/100": (
        Tile(16, 64, 128, 8, 4),
        Tile(32, 64, 128, 8, 4),
        Tile(64, 64, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
    ),
    "float32/100": (
        Tile(16, 32, 32, 8, 2),
        Tile(32, 32, 32, 8, 2),
        Tile(32, 32, 32, 8, 2),
        Tile(32, 32, 32, 8, 2),
    ),
}


def bucket(rows: int) -> int:
    """The bucket that so many rows of x are in: an index into ROWS, or one beyond."""
    return next((place for place, most in enumerate(ROWS) if rows <= most), len(ROWS))


def find_tile(kind: str, capability: int, device: str, rows: int, columns: int, depth: int) -> Tile:
    """kind: of DEFAULT. capability: 90 for 9.0. rows, columns, depth: M, N, K."""
    place = bucket(rows)
    defaults = DEFAULT.get(f"{kind}/{capability}", DEFAULT[kind])
    default = defaults[min(place, len(defaults) - 1)]
    return TUNED.get(device, {}).get((kind, columns, depth, place), default)


def split(tile: Tile, rows: int, columns: int, depth: int, num_sms: int) -> int:
    """How many parts K's sum has: two programs for each multiprocessor, of four turns at least."""
    place = bucket(rows)
    if place == len(ROWS):
        return 1
    if tile.split_k:
        return tile.split_k
    tiles = -(-ROWS[place] // tile.block_m) * -(-columns // tile.block_n)
    wanted = min(2 * num_sms // tiles, depth // (4 * tile.block_k), 16)
    return 1 << (max(wanted, 1).bit_length() - 1)
