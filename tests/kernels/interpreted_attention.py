"""The attention kernels in Triton's interpreter, against the reference: run by
`test_attention.py` in a process of its own, since the interpreter is a whole process's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from inlay.backends.kernels.triton import attention_plan
from inlay.backends.kernels.triton.attention_configs import Tiles, tiles_for
from inlay.backends.kernels.triton.launch import Target, is_interpreting
from inlay.passes.kv_formats import KV_CACHE_DTYPES
from tests.backends import test_cpu_ops
from tests.backends.test_cpu_attention_masks import alibi
from tests.backends.test_cpu_ops import Attention
from tests.kernels.attention_cases import FP8, INT8, check, run_reference, run_triton, stored

assert is_interpreting(), "set TRITON_INTERPRET=1 before triton is imported"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CACHES = tuple(KV_CACHE_DTYPES.values())
# (tokens in the cache after the step, new tokens): a prompt, decodes, a chunk, a padding request,
# a whole tile.
MIXED = ((7, 7), (40, 1), (75, 21), (0, 0), (1, 1))
DECODE = ((40, 1), (1, 1), (75, 1), (16, 1))
WHOLE = ((1, 1), (16, 16), (50, 50))
FEW, MANY = Target(90, 1), Target(90, 132)
"""Devices for one split of the keys and for as many as there are tiles."""


def attention(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    num_kv_heads: int = 1,
    group: int = 4,
    block_size: int = 16,
    requests: tuple[tuple[int, int], ...] = MIXED,
    padding: int = 3,
    **options: object,
) -> Attention:
    """As small as makes a difference: the interpreter takes a few milliseconds for a program."""
    shape = head_dim, v_head_dim, num_kv_heads, group, block_size
    return test_cpu_ops.attention(dtype, *shape, requests, padding, **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 rows and 32 or 16 keys, so that small calls have many."""
    tiles = Tiles(16, 32, 16, 4, 1)
    monkeypatch.setattr(attention_plan, "tiles_for", lambda *_: tiles)


@pytest.mark.parametrize("target", [FEW, MANY], ids=["whole", "split"])
@pytest.mark.parametrize(
    "dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)], ids=str
)
def test_mixed_and_decode(dtype: torch.dtype, target: Target) -> None:
    check(attention(dtype, 16, None, 2, 2), target=target)
    check(attention(dtype, 16, None, 2, 2, requests=DECODE, padding=0), target=target)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[::2])],
    ids=str,
)
def test_the_tables_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "tiles_for", tiles_for)
    check(attention(dtype, 64, requests=((70, 70), (200, 1))))


SHAPES = [  # head_dim, v_head_dim, num_kv_heads, group, block_size
    (80, 80, 2, 1, 32),
    (96, 64, 1, 3, 16),
    (20, 20, 2, 7, 16),
    (3, 1, 1, 37, 16),
]
SLOW_SHAPES = [
    (24, 72, 1, 2, 48),
    (16, 16, 1, 2, 128),
    (128, 96, 2, 2, 64),
    (256, 256, 1, 2, 16),
    (192, 128, 1, 19, 48),
]


@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW_SHAPES)], ids=str
)
def test_shapes(shape: tuple[int, ...]) -> None:
    check(attention(torch.float16, *shape, requests=MIXED[:4]), target=MANY)
    check(attention(torch.float16, *shape, requests=DECODE[:3], padding=0), target=FEW)


FEW_OPTIONS: list[dict[str, object]] = [
    {"chunk": 24, "window": 9},
    {"softcap": 2.0},
    {"sinks": torch.tensor([-3.0, 0.0, 2.0, 30.0])},
    {"slopes": torch.tensor([0.3, 0.11, 0.0703, 0.5]).bfloat16()},
    {"slopes": alibi(4), "softcap": 2.0, "window": 20, "sinks": torch.ones(4)},
]
MORE_OPTIONS: list[dict[str, object]] = [
    {"window": 1},
    {"window": 20},
    {"chunk": 24},
    {"scale": 0.0},
    {"slopes": alibi(4)},
]
OPTIONS = [*FEW_OPTIONS, *MORE_OPTIONS]


@pytest.mark.parametrize(
    "options",
    [*FEW_OPTIONS, *(pytest.param(o, marks=pytest.mark.slow) for o in MORE_OPTIONS)],
    ids=str,
)
def test_options(options: dict[str, object]) -> None:
    check(attention(torch.float32, 16, requests=MIXED, **options), target=MANY)
    check(attention(torch.float16, 16, requests=DECODE, padding=0, **options), target=FEW)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"chunk": 20}], ids=str)
def test_encoders_see_both_sides(options: dict[str, object]) -> None:
    check(attention(requests=WHOLE, head_dim=16, causal=False, **options))


def test_softcap_is_accurate_near_zero_and_when_saturated() -> None:
    for softcap in (1e-3, 0.5, 1e4):
        check(attention(scale=1.0, softcap=softcap, requests=((20, 20), (9, 1)), group=2))


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[:2])],
    ids=str,
)
def test_every_cache(dtype: torch.dtype, cache: torch.dtype) -> None:
    check(attention(dtype, 24, 20, 2, 1), cache, target=MANY)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [FP8, INT8], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_over_quantized_caches(options: dict[str, object], cache: torch.dtype) -> None:
    check(attention(torch.bfloat16, 24, requests=MIXED, **options), cache, target=MANY)
    check(attention(torch.bfloat16, 24, requests=DECODE, padding=0, **options), cache, target=FEW)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_layers_scale_of_fp8(scale: float) -> None:
    check(attention(torch.bfloat16, 16, requests=MIXED), FP8, scale)


def test_numbers_that_a_cache_cannot_hold() -> None:
    """Too large, too small, infinite, not numbers, halfway between two: as the reference rounds."""
    call = attention(torch.float32, 16, requests=((5, 5), (3, 3)), num_kv_heads=1, group=1)
    odd = [0.0, -0.0, 1e-9, 2**-10, 3 * 2**-11, 0.0175, 447.0, 464.0, 500.0, -1e6, 3.4e38, 1.0625]
    call.k[0, 0, :12] = torch.tensor(odd)
    call.v[1, 0, :12] = -torch.tensor(odd)
    call.v[2] = 0.0
    call.v[3, 0, 3] = float("nan")
    call.v[4, 0, 5] = float("inf")
    for cache in CACHES:
        k, v = stored(call.k_cache, cache), stored(call.v_cache, cache)
        ours, theirs = run_triton(call, k, v, "cpu", FEW), run_reference(call, k, v)
        for mine, its in zip(ours.written, theirs.written, strict=True):
            if its is not None and mine is not None:
                torch.testing.assert_close(
                    mine.float(), its.float(), rtol=0, atol=0, equal_nan=True
                )


def test_all_numbers_of_e4m3_and_their_midpoints_round_as_torch_rounds() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    real = every[every.isfinite()].sort().values
    middle = (real[1:] + real[:-1]) / 2
    up = torch.nextafter(middle, torch.tensor(1e9))
    numbers = torch.cat([real, middle, up, -up])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 16)).view(-1, 1, 16)
    size = len(numbers)
    call = attention(head_dim=16, num_kv_heads=1, group=1, requests=((size, size),), padding=0)
    call.k, call.v = numbers, -numbers
    ours = run_triton(call, stored(call.k_cache, FP8), stored(call.v_cache, FP8), "cpu", FEW)
    theirs = run_reference(call, stored(call.k_cache, FP8), stored(call.v_cache, FP8))
    for mine, its in zip(ours.written[:2], theirs.written[:2], strict=True):
        assert mine is not None
        assert its is not None
        written = call.slot_mapping
        flat = (x.view(torch.uint8).transpose(1, 2).reshape(-1, 16)[written] for x in (mine, its))
        assert torch.equal(*flat)


def test_only_padding() -> None:
    call = attention(torch.float16, 16, requests=((0, 0), (0, 0)), padding=4)
    k, v = stored(call.k_cache, torch.float16), stored(call.v_cache, torch.float16)
    result = run_triton(call, k, v, "cpu", MANY)
    assert torch.equal(result.out, torch.zeros_like(result.out))
    assert all(x.isnan().all() for x in result.written[:2] if x is not None)


@pytest.mark.parametrize("options", [{"window": 20}, {"chunk": 24}], ids=str)
def test_pages_that_nobody_sees_any_more_are_not_read(options: dict[str, int]) -> None:
    """Their entries point far outside the cache, or at NaN."""
    call = attention(torch.float16, 16, requests=((75, 1), (90, 11), (60, 1)), padding=0, **options)
    cache = torch.float16
    expected = run_triton(
        call, stored(call.k_cache, cache), stored(call.v_cache, cache), "cpu", FEW
    )
    assert expected.out.isfinite().all()
    for request, (length, new) in enumerate(((75, 1), (90, 11), (60, 1))):
        first = length - new
        oldest = first - 19 if "window" in options else first // 24 * 24
        call.block_table[request, : oldest // 16] = 1 << 28
    got = run_triton(call, stored(call.k_cache, cache), stored(call.v_cache, cache), "cpu", FEW)
    assert torch.equal(got.out, expected.out)


def test_infinite_and_nan_inputs_stay_in_their_row() -> None:
    call = attention(torch.float16, 16, requests=((40, 40), (33, 1)), padding=1)
    cache = stored(call.k_cache, torch.float16), stored(call.v_cache, torch.float16)
    clean = run_triton(call, *cache, "cpu", MANY).out
    call.q[3] = float("nan")
    out = run_triton(call, *cache, "cpu", MANY).out
    assert out[3].isnan().all()
    assert torch.equal(out[:3], clean[:3])
    assert torch.equal(out[4:], clean[4:])


WRONG = [
    ({"window": 20}, {"window": 21}),
    ({"window": 20}, {}),
    ({"chunk": 24}, {"chunk": 25}),
    ({"scale": 0.3}, {"scale": 0.303}),
    ({"softcap": 2.0}, {"softcap": 2.02}),
    ({"sinks": torch.zeros(4)}, {}),
    ({"slopes": alibi(4)}, {"slopes": alibi(4).flip(0)}),
    ({"slopes": alibi(4)}, {"slopes": alibi(4).bfloat16() * 1.01}),
    ({}, {"causal": False}),
]


@pytest.mark.parametrize(("right", "wrong"), WRONG, ids=str)
def test_wrong_twins_are_seen(right: dict[str, object], wrong: dict[str, object]) -> None:
    call = attention(torch.float16, 16, requests=WHOLE, **wrong)
    other = attention(torch.float16, 16, requests=WHOLE, **right)
    with pytest.raises(AssertionError, match="not close"):
        check(call, expected_of=other, target=MANY)


def test_a_wrong_scale_of_the_cache_is_seen() -> None:
    call = attention(torch.float16, 16, requests=DECODE, padding=0)
    for cache in (FP8, INT8):
        k, v = stored(call.k_cache, cache, 2.0), stored(call.v_cache, cache, 2.0)
        assert v[1] is not None
        right = run_triton(call, k, v, "cpu", MANY).out
        wrong = run_triton(call, k, (v[0], v[1] * 1.05), "cpu", MANY).out
        assert (right - wrong).abs().max() > 1e-2


def test_a_request_of_two_tokens_where_tokens_are_no_more_than_requests() -> None:
    """Shapes alone do not say that each request brings one token."""
    requests = ((40, 2), (0, 0), (17, 1), (0, 0), (30, 3))
    check(attention(torch.float16, 16, requests=requests, padding=0, window=9), target=MANY)
    call = attention(torch.float16, 16, requests=((40, 1),), padding=1)  # a lone decode
    check(call, target=MANY)
    check(replace(call, causal=False), target=FEW)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
