"""Which keys the C++ paged attention lets a query see, and what ALiBi adds to them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.backends.test_cpu_ops import (  # _loaded is a fixture
    DTYPES,
    ISAS,
    LONG,
    MIXED,
    Attention,
    _loaded,
    alone,
    attention,
)

__all__ = ["_loaded"]
pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(params=["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ISAS)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """This CPU's best by default: the kernels differ in their width, not in what they mask."""
    try:
        torch.ops.inlay_cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.inlay_cpu.set_isa("auto")


# (tokens in the cache after the step, new tokens): decodes, chunks of prompts and whole prompts on
# both sides of a tile's 64 and a split's 512 tokens.
PROMPTS = tuple((n, n) for n in (1, 2, 15, 17, 63, 65, 511, 513))
STEPS = ((1200, 1), (513, 1), (512, 1), (101, 1), (1100, 90), (1024, 130), (640, 129), (1200, 1200))
WHOLE = tuple((n, n) for n in (1, 7, 16, 64, 66, 200, 513, 1200))
SHAPES = [(24, 40, 1, 3), (80, 80, 1, 1), (16, 16, 2, 2)]  # head_dim, v_head_dim, Hk, group


def alibi(num_heads: int) -> torch.Tensor:
    """The slopes of Press et al. for a power of two of heads, spread alike for others."""
    return 2.0 ** -(torch.arange(1, num_heads + 1) * 8 / num_heads)


@functools.cache
def expected_mask(length: int, causal: bool, window: int, chunk: int) -> torch.Tensor:
    """[query, key], key by key from the contract's sentences."""
    mask = torch.ones(length, length, dtype=torch.bool)
    for p in range(length):
        for key in range(length):
            late = causal and key > p
            far = window > 0 and abs(key - p) >= window
            elsewhere = chunk > 0 and key // chunk != p // chunk
            mask[p, key] = not (late or far or elsewhere)
    return mask


def one_request(length: int, new: int, dv: int, **options: object) -> Attention:
    """All scores 0 and values the rows of a unit matrix: outputs are the mask itself, spread."""
    call = attention(head_dim=4, v_head_dim=dv, num_kv_heads=1, group=1, requests=((length, new),))
    call = replace(call, scale=0.0, **options)  # type: ignore[arg-type]
    values = torch.eye(length, dv)
    call.v[:new] = values[length - new :, None]
    for position in range(length - new):
        block = call.block_table[0, position // 16]
        call.v_cache[block, 0, position % 16] = values[position]
    return call


@pytest.mark.parametrize(
    ("causal", "window", "chunk"),
    [
        *((True, 0, chunk) for chunk in (1, 5, 64, 100, 512, 513, 2**40)),
        *((True, window, chunk) for window, chunk in ((1, 5), (64, 65), (70, 100), (530, 560))),
        *((False, window, 0) for window in (1, 2, 7, 64, 65, 512, 600, 2**40)),
        (False, 30, 100),
        (False, 0, 100),
        (False, 0, 0),
        (True, 0, 0),
    ],
    ids=str,
)
def test_a_query_sees_exactly_these_keys(causal: bool, window: int, chunk: int) -> None:
    length = 600
    mask = expected_mask(length, causal, window, chunk)
    options = {"causal": causal, "window": window, "chunk": chunk}
    for new in (length, 1, 90) if causal else (length,):
        out = one_request(length, new, length, **options).run()[0][:new, 0]
        rows = mask[length - new :]
        assert torch.equal(out > 0, rows)
        # A row's weights are equal; each is 1 / count in float32 after a handful of roundings.
        even = rows / rows.sum(1, keepdim=True)
        torch.testing.assert_close(out, even, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [5, 64, 100, 600])
def test_chunks(dtype: torch.dtype, shape: tuple[int, ...], chunk: int) -> None:
    for requests in (MIXED, PROMPTS, STEPS):
        attention(dtype, *shape, requests=requests, chunk=chunk).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [1, 7, 65, 600])
def test_windows_to_both_sides(dtype: torch.dtype, shape: tuple[int, ...], window: int) -> None:
    attention(dtype, *shape, requests=WHOLE, window=window, causal=False).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("requests", [MIXED, STEPS, ((5000, 1), (4097, 40))], ids=str)
def test_alibi(
    dtype: torch.dtype, shape: tuple[int, ...], requests: tuple[tuple[int, int], ...]
) -> None:
    slopes = alibi(shape[2] * shape[3])
    attention(dtype, *shape, requests=requests, slopes=slopes).check()


def test_slopes_of_another_dtype_are_widened() -> None:
    attention(slopes=alibi(4).half()).check()
    attention(slopes=alibi(4).double()).check()


def test_slopes_of_bfloat16_round_their_products() -> None:
    """Falcon's: beyond position 256 the products are no longer what float32 has."""
    requests = ((700, 1), (600, 90))
    slopes = torch.tensor([0.3, 0.11, 0.0703, 0.5]).bfloat16()
    call = attention(slopes=slopes, requests=requests)
    call.check()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            replace(call, slopes=slopes.float()).run()[0].double(),
            call.reference()[0],
            atol=3e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 100, "window": 37},
        {"chunk": 37, "window": 100},
        {"chunk": 600, "window": 530},
        {"chunk": 100, "softcap": 2.0},
        {"chunk": 100, "causal": False, "requests": WHOLE},
        {"chunk": 100, "causal": False, "window": 30, "requests": WHOLE},
        {"slopes": alibi(4), "softcap": 2.0},
        {"slopes": alibi(4), "window": 65},
        {"slopes": alibi(4), "chunk": 100},
        {"slopes": alibi(4), "causal": False, "window": 65, "requests": WHOLE},
        {"slopes": -alibi(4), "scale": 0.0},
        {"slopes": torch.zeros(4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_options_together(dtype: torch.dtype, options: dict[str, object], with_sinks: bool) -> None:
    sinks = torch.tensor([-3.0, 0.0, 2.0, 30.0]) if with_sinks else None
    attention(dtype, 24, sinks=sinks, **options).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"chunk": 100}, {"chunk": 99}),
        ({"chunk": 100}, {"chunk": 0}),
        ({"chunk": 600}, {"chunk": 601}),
        ({"chunk": 100, "window": 37}, {"chunk": 100, "window": 38}),
        ({"window": 65, "causal": False}, {"window": 64, "causal": False}),
        ({"window": 65, "causal": False}, {"window": 65}),
        ({"window": 65, "causal": False}, {"causal": False}),
        ({"slopes": alibi(4)}, {"slopes": None}),
        ({"slopes": alibi(4)}, {"slopes": -alibi(4)}),
        ({"slopes": alibi(4)}, {"slopes": alibi(4).flip(0)}),
        ({"slopes": alibi(4)}, {"slopes": alibi(4) * 1.05}),
        ({"slopes": alibi(4), "softcap": 2.0}, {"slopes": alibi(4) * 1.05, "softcap": 2.0}),
    ],
    ids=str,
)
def test_the_tolerance_tells_wrong_from_right(
    dtype: torch.dtype, right: dict[str, object], wrong: dict[str, object]
) -> None:
    """The wrong twin must fail where the right one passes."""
    attention(dtype, requests=WHOLE, **right).check()
    call = attention(dtype, requests=WHOLE, **wrong)
    call_right = attention(dtype, requests=WHOLE, **right)
    call.reference = call_right.reference  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="not close"):
        call.check()


def test_blocks_behind_the_chunk_are_never_read() -> None:
    call = attention(chunk=100, requests=((350, 1), (190, 30)))
    expected = call.run()[0]
    for b, oldest in enumerate((300, 100)):
        released = oldest // 16
        blocks = call.block_table[b, :released].long()
        call.k_cache[blocks], call.v_cache[blocks] = float("nan"), float("nan")
        call.block_table[b, :released] = -1
    assert torch.equal(call.run()[0], expected)
    call.block_table[0, 300 // 16] = -1
    with pytest.raises(RuntimeError, match=r"block_table\[0, 18\] is -1"):
        call.run()


INVARIANT = [
    {"chunk": 5},
    {"chunk": 100},
    {"chunk": 600, "window": 530},
    {"slopes": alibi(6)},
    {"slopes": alibi(6), "softcap": 2.0, "chunk": 600},
]
TO_BOTH_SIDES = [
    {"causal": False, "window": 65, "requests": WHOLE},
    {"causal": False, "window": 600, "requests": WHOLE},
    {"causal": False, "chunk": 100, "requests": WHOLE},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [*INVARIANT, *TO_BOTH_SIDES], ids=str)
def test_bitwise_equal_in_any_batch(dtype: torch.dtype, options: dict[str, object]) -> None:
    requests = options.get("requests", LONG)
    call = attention(dtype, 24, None, 2, 3, **{**options, "requests": requests})  # type: ignore[arg-type]
    together = call.run()[0]
    assert not together.isnan().any()
    for request in range(len(call.seq_lens)):
        begin, end = call.query_start_loc[request : request + 2].tolist()
        assert torch.equal(alone(call, request).run()[0], together[begin:end]), request


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", INVARIANT, ids=str)
def test_bitwise_equal_in_any_chunks(dtype: torch.dtype, options: dict[str, object]) -> None:
    call = attention(dtype, 24, 40, 1, 6, requests=((700, 700),), padding=0, **options)  # type: ignore[arg-type]
    whole, k_written, v_written = call.run()
    pieces, position = [], 0
    for size in (1, 63, 200, 7, 1, 1, 320, 107):
        rows = slice(position, position + size)
        position += size
        piece = replace(
            call,
            q=call.q[rows],
            k=call.k[rows],
            v=call.v[rows],
            slot_mapping=call.slot_mapping[rows],
            seq_lens=torch.tensor([position], dtype=torch.int32),
            query_start_loc=torch.tensor([0, size], dtype=torch.int32),
        )
        out, piece_k, piece_v = piece.run()
        call.k_cache, call.v_cache = piece_k.contiguous(), piece_v
        pieces.append(out)
    assert position == 700
    assert torch.equal(torch.cat(pieces), whole)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(call.k_cache, k_written, **exact)
    torch.testing.assert_close(call.v_cache, v_written, **exact)


@pytest.mark.parametrize("options", [*INVARIANT, *TO_BOTH_SIDES], ids=str)
def test_bitwise_equal_for_any_number_of_threads(options: dict[str, object]) -> None:
    requests = options.get("requests", LONG)
    call = attention(torch.bfloat16, 64, None, 1, 6, **{**options, "requests": requests})  # type: ignore[arg-type]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            lone = [alone(call, b).run()[0] for b in range(len(call.seq_lens))]
            results.append([call.run()[0], *lone])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
