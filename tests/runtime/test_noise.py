from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inlay.runtime.noise import _splitmix64, gumbel, row_keys, uniforms
from tests.runtime.chi_square import assert_distributed

MASK_64, MASK_32 = 2**64 - 1, 2**32 - 1


def reference_key(seed: int, position: int) -> int:
    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & MASK_64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
        return x ^ (x >> 31)

    return splitmix64((splitmix64(seed & MASK_64) + position * 0x9E3779B97F4A7C15) & MASK_64)


def reference_gumbel(key: int, token_id: int) -> float:
    h = (token_id + key) & MASK_32
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK_32
    h = (((h ^ (h >> 15)) ^ (key >> 32)) * 0x846CA68B) & MASK_32
    h ^= h >> 16
    v = float(np.float32((h & 0x7FFFFFFF) | 1)) * 2.0**-31
    return -math.log(-math.log1p(-v)) if v < 1 else -math.inf


def test_splitmix64_known_value() -> None:
    """What the authors' splitmix64.c returns first for the state 0."""
    assert int(_splitmix64(torch.tensor([0]))) & MASK_64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_equals_plain_integer_arithmetic(seed: int) -> None:
    positions = torch.tensor([0, 1, 31, 2**20])
    tokens = torch.tensor([0, 1, 2, 77, 31999, 152063], dtype=torch.int32)
    keys = row_keys(torch.full_like(positions, seed), positions)
    expected_keys = [reference_key(seed, p) for p in positions.tolist()]
    assert [k & MASK_64 for k in keys.tolist()] == expected_keys
    expected = [[reference_gumbel(k, t) for t in tokens.tolist()] for k in expected_keys]
    torch.testing.assert_close(gumbel(keys, tokens), torch.tensor(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_hosts_uniforms_are_those_of_the_noise(seed: int) -> None:
    keys = row_keys(torch.tensor([seed]), torch.tensor([5]))
    v = torch.from_numpy(uniforms(int(keys[0]), 40_000))
    expected = gumbel(keys, torch.arange(40_000, dtype=torch.int32))[0]
    torch.testing.assert_close((-v).log1p().neg().log().neg(), expected, rtol=0, atol=0)
    some = np.array([39_999, 3, 77])
    assert (uniforms(int(keys[0]), some) == v.numpy()[some]).all()


def test_does_not_depend_on_the_batch() -> None:
    """The same bits whatever rows and tokens are computed along with it."""
    keys = row_keys(torch.arange(33), torch.arange(33) * 7)
    tokens = torch.arange(1013, dtype=torch.int32)
    whole = gumbel(keys, tokens)
    for row in (0, 1, 17, 32):
        torch.testing.assert_close(
            gumbel(keys[row : row + 1], tokens)[0], whole[row], rtol=0, atol=0
        )
    some = torch.tensor([[5, 900, 3], [1012, 0, 3]], dtype=torch.int32)
    picked = whole[:2].gather(1, some.long())
    torch.testing.assert_close(gumbel(keys[:2], some), picked, rtol=0, atol=0)
    for width in (1, 3, 64, 1000):
        torch.testing.assert_close(gumbel(keys, tokens[:width]), whole[:, :width], rtol=0, atol=0)


def test_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, tokens = row_keys(torch.arange(5), torch.arange(5)), torch.arange(3003).int()
    whole = gumbel(keys, tokens)
    for elements in (2, 1000, 1 << 16):
        monkeypatch.setattr("inlay.runtime.noise._CHUNK", elements)
        torch.testing.assert_close(gumbel(keys, tokens), whole, rtol=0, atol=0)
        each = tokens.expand(5, -1)
        torch.testing.assert_close(gumbel(keys, each), whole, rtol=0, atol=0)


def test_is_gumbel_distributed() -> None:
    keys = row_keys(torch.arange(200), torch.zeros(200, dtype=torch.int64))
    noise = gumbel(keys, torch.arange(5000, dtype=torch.int32)).flatten().numpy()
    quantiles = np.linspace(0, 1, 65)[1:-1]
    edges = -np.log(-np.log(quantiles))
    counts = np.bincount(np.searchsorted(edges, noise), minlength=64)
    assert_distributed(counts, np.full(64, 1 / 64))
    assert np.isfinite(noise).all()


def test_upper_tail_is_fine_enough() -> None:
    """The largest of n Gumbels is Gumbel + log(n): coarse noise would cut it off."""
    keys = row_keys(torch.arange(400), torch.full((400,), 9))
    largest = gumbel(keys, torch.arange(50_000, dtype=torch.int32)).amax(-1).numpy()
    edges = -np.log(-np.log(np.linspace(0, 1, 17)[1:-1])) + math.log(50_000)
    counts = np.bincount(np.searchsorted(edges, largest), minlength=16)
    assert_distributed(counts, np.full(16, 1 / 16))


@pytest.mark.parametrize("neighbour", ["position", "seed", "token"])
def test_neighbours_are_independent(neighbour: str) -> None:
    count = 40_000
    numbers, zeros = torch.arange(count + 1), torch.zeros(count + 1, dtype=torch.int64)
    one = torch.tensor([3], dtype=torch.int32)
    if neighbour == "position":
        noise = gumbel(row_keys(zeros, numbers), one).flatten()
    elif neighbour == "seed":
        noise = gumbel(row_keys(numbers, zeros), one).flatten()
    else:
        noise = gumbel(row_keys(zeros[:1], zeros[:1]), numbers.to(torch.int32)).flatten()
    edges = torch.tensor(-np.log(-np.log(np.linspace(0, 1, 9)[1:-1])), dtype=torch.float32)
    bucket = torch.bucketize(noise, edges)
    pairs = bucket[:-1] * 8 + bucket[1:]
    assert_distributed(np.bincount(pairs.numpy(), minlength=64), np.full(64, 1 / 64))
