"""Counter-based Gumbel noise: a pure function of (seed, position, token id).

No generator state is kept, so the noise of a token is the same in any batch and slot, and a
preempted request that is computed again samples the same tokens.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


GOLDEN_64 = _signed(0x9E3779B97F4A7C15, 64)
SPLITMIX_1 = _signed(0xBF58476D1CE4E5B9, 64)
SPLITMIX_2 = _signed(0x94D049BB133111EB, 64)
LOWBIAS_1 = _signed(0x7FEB352D, 32)
LOWBIAS_2 = _signed(0x846CA68B, 32)

_CHUNK = (1 << 15) - 1
"""Numbers hashed at once on a CPU. They stay in the cache over a dozen passes; and torch splits
larger operations over threads, hundreds of times per step, each of which may cost a scheduler
quantum (8 ms) where other programs use the cores too."""


def row_keys(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A 64-bit key for each (seed, position) pair: int64 [N], int64 [N] -> int64 [N].

    splitmix64's finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014), once over the seed and once more with the position added.
    """
    return _splitmix64(_splitmix64(seeds) + positions * GOLDEN_64)


def gumbel(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32 [N, K], from keys int64 [N] and token ids int32 [K] or [N, K].

    -log1p(-v) keeps the resolution of v at 2**-31 where it counts: of the exponentials the small
    ones win.
    """
    noise = torch.empty(len(keys), token_ids.shape[-1], dtype=torch.float32, device=keys.device)
    width = noise.shape[1] if noise.device.type != "cpu" else _CHUNK // max(len(keys), 1) or 1
    for start in range(0, noise.shape[1], width):
        chunk = slice(start, start + width)
        noise[:, chunk] = _negative_uniforms(keys, token_ids[..., chunk])
    return noise.log1p_().neg_().log_().neg_()


def uniforms(key: int, token_ids: int | np.ndarray) -> np.ndarray:
    """The v in (0, 1] behind gumbel's noise, float32 [K], of one row on the host: the same bits.

    token_ids: int64 [K], or how many from 0 on. numpy's shifts are logical, and its calls cheap
    enough to keep the numbers in the cache.
    """
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32((key >> 32) & 0xFFFFFFFF)
    h = (_count(token_ids) if isinstance(token_ids, int) else token_ids.astype(np.uint32)) + low
    shifted = np.empty_like(h)
    for shift, factor, mixed in ((16, LOWBIAS_1, None), (15, LOWBIAS_2, high)):
        np.right_shift(h, np.uint32(shift), out=shifted)
        h ^= shifted
        if mixed is not None:
            h ^= mixed
        h *= np.uint32(factor & 0xFFFFFFFF)
    np.right_shift(h, np.uint32(16), out=shifted)
    h ^= shifted
    h &= np.uint32(0x7FFFFFFF)
    h |= np.uint32(1)
    v = h.view(np.int32).astype(np.float32)
    v *= np.float32(2.0**-31)
    return v


@lru_cache(maxsize=8)
def _count(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.uint32)


def _negative_uniforms(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [-1, 0): the hash lowbias32, with the key's halves mixed in.

    From C. Wellons, "Prospecting for hash functions", 2018. One half of the key comes before each
    of the two multiplications, so that no two keys give the same noise at shifted token ids.
    """
    low = (keys & 0xFFFFFFFF).to(torch.int32).unsqueeze(-1)
    high = (keys >> 32).to(torch.int32).unsqueeze(-1)
    h = token_ids + low
    h ^= (h >> 16) & 0xFFFF
    h *= LOWBIAS_1
    h ^= (h >> 15) & 0x1FFFF
    h ^= high
    h *= LOWBIAS_2
    h ^= (h >> 16) & 0xFFFF
    # An odd number is never zero, so that no token gets infinite noise.
    h = (h & 0x7FFFFFFF).bitwise_or_(1)
    return h.to(torch.float32).mul_(-(2.0**-31))


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    x = x + GOLDEN_64
    # torch shifts int64 arithmetically; the masks make the shifts logical.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * SPLITMIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SPLITMIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
