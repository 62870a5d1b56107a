"""Paged attention over caches of every dtype: the reference, and the C++ kernel beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inlay.backends.kernels.kv_layout import pack_keys, pack_values, unpack_keys, unpack_values
from inlay.passes import ops as reference_ops
from inlay.passes.kv_formats import KV_CACHE_DTYPES, dequantize, make_scales, quantize
from tests.backends.test_cpu_attention_masks import alibi
from tests.backends.test_cpu_ops import (  # _loaded and isa are fixtures
    ATOL,
    DTYPES,
    LONG,
    MIXED,
    RTOL,
    Attention,
    _loaded,
    alone,
    attention,
    isa,
)

__all__ = ["_loaded", "isa"]
OPS = ("reference", "kernel")
FP8, INT8 = torch.float8_e4m3fn, torch.int8
CACHES = tuple(KV_CACHE_DTYPES.values())
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}

Store = tuple[torch.Tensor, torch.Tensor | None]
"""A cache of keys or values in the reference's layout, and its scales."""


def stored(cache: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> Store:
    """A cache [blocks, Hk, block_size, D] in this format; what was never written is NaN."""
    layer = make_scales(dtype, *cache.shape[:3]) if dtype == FP8 else None
    layer = None if layer is None else layer.fill_(scale)
    values, made = quantize(cache, dtype, layer)
    return (values if values is not cache else cache.clone()), layer if made is None else made


def run(
    op: str, call: Attention, k: Store, v: Store
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The op's output, and all that it has written: k, v, k_scales, v_scales."""
    batch = call.slot_mapping, call.block_table, call.seq_lens, call.query_start_loc
    options = call.scale, call.window, call.softcap, call.sinks, call.causal, call.chunk
    tensors = [None if tensor is None else tensor.clone() for tensor in (k[0], v[0], k[1], v[1])]
    if op == "reference":
        out = reference_ops.paged_attention(
            call.q, call.k, call.v, *tensors[:2], *batch, 0, *options, call.slopes, *tensors[2:]
        )
        return out, tensors
    tensors[:2] = pack_keys(k[0]), pack_values(v[0])
    if k[0].dtype == call.q.dtype:  # as the backend does
        out = torch.ops.inlay_cpu.paged_attention(
            call.q, call.k, call.v, *tensors[:2], *batch, *options, call.slopes
        )
    else:
        out = torch.ops.inlay_cpu.paged_attention_converted(
            call.q, call.k, call.v, *tensors, *batch, *options, call.slopes
        )
    k_written, v_written = unpack_keys(tensors[0], k[0].shape[3]), unpack_values(tensors[1])
    return out, [k_written, v_written, *tensors[2:]]


def as_read(call: Attention, k: Store, v: Store) -> Attention:
    """The same call over what the cache gives back, in float64: nothing is lost from there on."""

    def new_tokens(x: torch.Tensor, cache: Store) -> torch.Tensor:
        values, scales = quantize(x, cache[0].dtype, cache[1])
        return dequantize(values, cache[1] if scales is None else scales).double()

    return replace(
        call,
        k=new_tokens(call.k, k),
        v=new_tokens(call.v, v),
        k_cache=dequantize(*k).double(),
        v_cache=dequantize(*v).double(),
    )


def check(op: str, call: Attention, dtype: torch.dtype, scale: float = 1.0) -> None:
    """The op equals exact attention over what its cache holds, and the cache is the format's."""
    k, v = stored(call.k_cache, dtype, scale), stored(call.v_cache, dtype, scale)
    out, written = run(op, call, k, v)
    read = as_read(call, k, v)
    expected, k_expected, v_expected = read.reference()
    read.q = call.q  # its dtype says how weights are rounded
    torch.testing.assert_close(out.double(), expected, rtol=RTOL[call.q.dtype], atol=read.atol())
    for cache, scales, its in zip(written[:2], written[2:], (k_expected, v_expected), strict=True):
        assert cache is not None
        torch.testing.assert_close(dequantize(cache, scales).double(), its, **EXACT)


SHAPES = [  # head_dim, v_head_dim, num_kv_heads, group, block_size
    (64, 64, 2, 7, 16),
    (20, 36, 3, 2, 32),
    (3, 1, 1, 130, 16),
    (72, 192, 1, 1, 48),
]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa: str, cache: torch.dtype, shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check("kernel", attention(dtype, *shape), cache)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_over_every_cache(dtype: torch.dtype, cache: torch.dtype) -> None:
    for shape in SHAPES:
        check("reference", attention(dtype, *shape), cache)


OPTIONS = [
    {"window": 37},
    {"window": 600, "softcap": 2.0},
    {"chunk": 100},
    {"chunk": 64, "window": 37},
    {"causal": False, "window": 30, "requests": ((7, 7), (64, 64), (200, 200))},
    {"sinks": torch.tensor([-3.0, 0.0, 2.0, 30.0])},
    {"slopes": alibi(4)},
    {"slopes": alibi(4).bfloat16(), "window": 65},
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cache", [torch.float16, FP8, INT8], ids=str)
def test_options(op: str, cache: torch.dtype) -> None:
    for options in OPTIONS:
        check(op, attention(head_dim=24, **options), cache)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_layers_scale_of_fp8(op: str, scale: float) -> None:
    check(op, attention(torch.bfloat16), FP8, scale)


def bound(call: Attention, cache: torch.dtype) -> float:
    """What a cache of this dtype may change in a float32 output.

    Scores move by at most d = scale * sum |q| e_k and weights by a factor of at most exp(2 d),
    so an output moves by max e_v + (exp(2 d) - 1) max |v|, e being the format's own error.
    """
    k, v = call.k.double(), call.v.double()

    def error(x: torch.Tensor) -> torch.Tensor:
        if cache == INT8:
            return (x.abs().amax(-1, keepdim=True) / 127 / 2).expand_as(x)
        unit, least = {
            torch.float32: (0.0, 0.0),
            torch.bfloat16: (2.0**-8, 0.0),
            torch.float16: (2.0**-11, 2.0**-25),
            FP8: (2.0**-4, 2.0**-10),
        }[cache]
        return (x.abs() * unit).clamp(min=least)

    heads = call.q.shape[1] // k.shape[1]
    sums = torch.einsum("qhd,khd->hqk", call.q.double().abs(), error(k).repeat_interleave(heads, 1))
    moved = (2 * call.scale * sums.max()).expm1()
    return float(error(v).max() + moved * v.abs().max())


@pytest.mark.parametrize("op", OPS)
def test_outputs_are_as_near_to_the_unquantized_caches_as_the_format_allows(op: str) -> None:
    requests = ((90, 90), (17, 17), (5, 5))  # whole prompts: k and v are all there is
    call = attention(head_dim=20, v_head_dim=36, requests=requests, padding=0, scale=0.02)
    exact = call.reference()[0]
    bounds, errors = {}, {}
    for cache in CACHES:
        out, _ = run(op, call, stored(call.k_cache, cache), stored(call.v_cache, cache))
        errors[cache] = float((out.double() - exact).abs().max())
        bounds[cache] = bound(call, cache)
        assert errors[cache] <= bounds[cache] + ATOL, cache
    # The bounds mean something: what e4m3 loses would not pass for int8, nor int8 for float16.
    assert errors[FP8] > bounds[INT8]
    assert errors[INT8] > bounds[torch.float16]


@pytest.mark.parametrize("cache", [torch.bfloat16, FP8, INT8], ids=str)
def test_bitwise_equal_in_any_batch(isa: str, cache: torch.dtype) -> None:
    call = attention(torch.float32, 32, None, 2, 3, requests=LONG, window=600)
    k, v = stored(call.k_cache, cache), stored(call.v_cache, cache)
    together = run("kernel", call, k, v)[0]
    for request in range(len(LONG)):
        begin, end = call.query_start_loc[request : request + 2].tolist()
        out = run("kernel", alone(call, request), k, v)[0]
        assert torch.equal(out, together[begin:end]), request


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_equal_in_any_chunks(op: str, dtype: torch.dtype, cache: torch.dtype) -> None:
    call = attention(dtype, 24, 40, 2, 3, requests=((300, 300),), padding=0)
    empty = stored(call.k_cache, cache), stored(call.v_cache, cache)
    whole, written = run(op, call, *empty)
    k, v = empty
    pieces, position = [], 0
    for size in (1, 63, 100, 7, 1, 128):
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
        out, tensors = run(op, piece, k, v)
        k, v = (tensors[0].contiguous(), tensors[2]), (tensors[1], tensors[3])
        pieces.append(out)
    for ours, theirs in zip((k[0], v[0], k[1], v[1]), written, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours.float(), theirs.float(), **EXACT)
    if op == "kernel":
        assert torch.equal(torch.cat(pieces), whole)
    else:  # products of other sizes are summed in another order, in float32
        rtol = max(RTOL[dtype], 1e-5)
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=2 * rtol, atol=ATOL)


def with_poison(call: Attention) -> Attention:
    """The same call with one more block before all others, full of NaN, which is nobody's."""
    before = (
        torch.full_like(call.k_cache[:1], torch.nan),
        torch.full_like(call.v_cache[:1], torch.nan),
    )
    block_size = call.k_cache.shape[2]
    slots = call.slot_mapping
    return replace(
        call,
        k_cache=torch.cat([before[0], call.k_cache]),
        v_cache=torch.cat([before[1], call.v_cache]),
        block_table=call.block_table + 1,
        slot_mapping=torch.where(slots >= 0, slots + block_size, slots),
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize(
    ("options", "oldest"),
    [
        ({"window": 40}, (300 - 40, 200 - 30 - 39, 700 - 40)),
        ({"window": 1}, (300 - 1, 200 - 30, 700 - 1)),
        ({"chunk": 100}, (200, 100, 600)),
        ({"chunk": 100, "window": 40}, (300 - 40, 200 - 30 - 39, 700 - 40)),
    ],
    ids=str,
)
def test_blocks_that_the_window_or_chunk_has_passed_are_never_read(
    op: str, cache: torch.dtype, options: dict[str, int], oldest: tuple[int, ...]
) -> None:
    """Their entries are 0, and block 0 is somebody else's."""
    call = attention(requests=((300, 1), (200, 30), (700, 1)), padding=0, **options)
    k, v = stored(call.k_cache, cache), stored(call.v_cache, cache)
    expected = run(op, call, k, v)[0]
    assert expected.isfinite().all()
    poisoned = with_poison(call)
    for request, position in enumerate(oldest):
        poisoned.block_table[request, : position // 16] = 0
    k, v = stored(poisoned.k_cache, cache), stored(poisoned.v_cache, cache)
    assert torch.equal(run(op, poisoned, k, v)[0], expected)
    # The next block is still seen.
    poisoned.block_table[0, oldest[0] // 16] = 0
    assert run(op, poisoned, k, v)[0][0].isnan().any()


def test_every_value_of_e4m3_is_read_as_it_is(isa: str) -> None:
    """One visible token: the output is its V. Tokens of 16 values each, both signs, NaN too."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8).view(16, 1, 16)
    call = attention(head_dim=16, num_kv_heads=1, group=1, requests=((17, 1),), padding=0, window=2)
    for token in range(16):
        cache = stored(call.v_cache, FP8)
        block = call.block_table[0].long()
        cache[0][block[0], 0, 15] = every[token, 0]
        cache[0][block[1], 0, 0] = 0
        tied = replace(call, scale=0.0, v=torch.zeros_like(call.v))
        out = run("kernel", tied, stored(call.k_cache, FP8), cache)[0]
        torch.testing.assert_close(out[0, 0], every[token, 0].float() / 2, **EXACT)


def cast(k: Store, v: Store, dtype: torch.dtype) -> tuple[Store, Store]:
    return (k[0].to(dtype), k[1]), (v[0].to(dtype), v[1])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda k, v: ((k[0], None), v), "a cache of Char needs k_scales"),
        (lambda k, v: (k, (v[0], None)), "a cache of Char needs v_scales"),
        (lambda k, v: ((k[0], k[1][:1]), v), "k_scales must have shape"),
        (lambda k, v: (k, (v[0], v[1].double())), "v_scales must be Float, got Double"),
        (lambda k, v: (k, (v[0].to(FP8), v[1])), "v_cache must have k_cache's dtype Char"),
        (lambda k, v: cast(k, v, torch.half), "a cache of Half takes no k_scales"),
        (lambda k, v: cast(k, v, FP8), r"k_scales must have shape \[1\]"),
        (lambda k, v: cast(k, v, torch.int), "k_cache must be float32, .* or int8, got Int"),
    ],
)
def test_wrong_caches_are_refused(broken, message: str) -> None:
    call = attention(requests=MIXED[:2])
    k, v = broken(stored(call.k_cache, INT8), stored(call.v_cache, INT8))
    with pytest.raises(RuntimeError, match=message):
        run("kernel", call, k, v)
