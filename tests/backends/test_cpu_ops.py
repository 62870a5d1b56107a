"""The C++ ops against their plain-PyTorch references, in float64 where that is the question."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from inlay.backends.kernels import cpu_ops
from inlay.backends.kernels.kv_layout import pack_keys, pack_values, unpack_keys, unpack_values
from inlay.errors import BuildError
from inlay.passes import ops as reference_ops

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Inputs are exact in every dtype and the reference runs in float64, so what is left is one rounding
# of the result, half a unit in the last place, and float32 inside: a score of size 40 (the largest
# here) is off by a few 2^-24 of itself, so is its weight, and that times a value of size 4 is 3e-5.
ATOL = 3e-5
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Iterator[None]:
    """One thread, unless a test asks for more: on a busy host threads wait 8 ms to meet."""
    cpu_ops.load_ops()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    wide = request.node.callspec.params.get("dtype") in (torch.float32, torch.float16)
    if request.param == "avx512_bf16" and wide:
        pytest.skip("the code of avx512")
    try:
        torch.ops.inlay_cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.inlay_cpu.set_isa("auto")


def tolerance(q: torch.Tensor, v: torch.Tensor) -> float:
    """The absolute one of an output of these queries and values.

    Where weights are rounded to bfloat16, each is off by at most 2^-9 of itself, and so a mean of
    values by 2^-9 of their mean distance from it, which is no more than the largest of them.
    """
    by_dots = torch.ops.inlay_cpu.get_isa() == "avx512_bf16" and q.dtype == torch.bfloat16
    return ATOL + (2.0**-9 * float(v.abs().max()) if by_dots else 0)


@dataclass
class Attention:
    """One call's arguments, in the reference's layout: k_cache [blocks, Hk, block_size, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scale: float = 0.3
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    causal: bool = True
    chunk: int = 0
    slopes: torch.Tensor | None = None

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The kernel's output and both caches after it, in the reference's layout."""
        k_cache, v_cache = pack_keys(self.k_cache), pack_values(self.v_cache)
        out = torch.ops.inlay_cpu.paged_attention(
            self.q, self.k, self.v, k_cache, v_cache, self.slot_mapping, self.block_table,
            self.seq_lens, self.query_start_loc, self.scale, self.window, self.softcap, self.sinks,
            self.causal, self.chunk, self.slopes,
        )  # fmt: skip
        return out, unpack_keys(k_cache, self.k_cache.shape[3]), unpack_values(v_cache)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same in float64."""
        k_cache, v_cache = self.k_cache.double(), self.v_cache.double()
        out = reference_ops.paged_attention(
            self.q.double(), self.k.double(), self.v.double(), k_cache, v_cache,
            self.slot_mapping, self.block_table, self.seq_lens, self.query_start_loc, 0,
            self.scale, self.window, self.softcap,
            None if self.sinks is None else self.sinks.double(), self.causal, self.chunk,
            self._exact_slopes(),
        )  # fmt: skip
        return out, k_cache, v_cache

    def _exact_slopes(self) -> torch.Tensor | None:
        """Slopes of bfloat16 mean products rounded to it."""
        if self.slopes is None or self.slopes.dtype == torch.bfloat16:
            return self.slopes
        return self.slopes.double()

    def atol(self) -> float:
        old = self.v_cache.nan_to_num(0)  # where nothing was written
        return tolerance(self.q, torch.cat((self.v.flatten(), old.flatten())))

    def check(self) -> None:
        out, k_cache, v_cache = self.run()
        expected, k_expected, v_expected = self.reference()
        torch.testing.assert_close(
            out.double(), expected, rtol=RTOL[self.q.dtype], atol=self.atol(), equal_nan=False
        )
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(k_cache.double(), k_expected, **exact)
        torch.testing.assert_close(v_cache.double(), v_expected, **exact)


# (tokens in the cache after the step, new tokens): a prompt, decodes, a chunk, a padding request,
# a length beyond a split of 512, one token alone, a whole tile.
MIXED = ((7, 7), (40, 1), (530, 1), (200, 90), (0, 0), (1, 1), (64, 64))


def attention(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    num_kv_heads: int = 2,
    group: int = 2,
    block_size: int = 16,
    requests: tuple[tuple[int, int], ...] = MIXED,
    padding: int = 3,
    seed: int = 0,
    **options: object,
) -> Attention:
    """Random arguments: fused QKV views, permuted blocks, NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(seed)
    d, dv, hk, hq = head_dim, v_head_dim or head_dim, num_kv_heads, num_kv_heads * group

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_tokens = sum(new for _, new in requests) + padding
    widths = (hq * d, hk * d, hk * dv)
    q, k, v = randn(num_tokens, sum(widths) + 5)[:, 5:].split(widths, dim=1)
    num_blocks = sum(-(-length // block_size) for length, _ in requests) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    k_cache = torch.full((num_blocks, hk, block_size, d), float("nan"), dtype=dtype)
    v_cache = torch.full((num_blocks, hk, block_size, dv), float("nan"), dtype=dtype)
    max_blocks = -(-max(length for length, _ in requests) // block_size) + 1
    block_table = torch.zeros(len(requests), max_blocks, dtype=torch.int32)
    slots, starts = [], [0]
    for b, (length, new) in enumerate(requests):
        for i in range(-(-length // block_size)):
            block_table[b, i] = free.pop()
        position = torch.arange(length)
        block, offset = block_table[b].long()[position // block_size], position % block_size
        old = length - new
        k_cache[block[:old], :, offset[:old]] = randn(old, hk, d)
        v_cache[block[:old], :, offset[:old]] = randn(old, hk, dv)
        slots.append((block * block_size + offset)[old:])
        starts.append(starts[-1] + new)
    return Attention(
        q.unflatten(1, (hq, d)),
        k.unflatten(1, (hk, d)),
        v.unflatten(1, (hk, dv)),
        k_cache,
        v_cache,
        torch.cat([*slots, torch.full((padding,), -1)]),
        block_table,
        torch.tensor([length for length, _ in requests], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        **options,  # type: ignore[arg-type]
    )


SHAPES = [  # head_dim, v_head_dim, num_kv_heads, group, block_size
    (16, 16, 1, 1, 16),
    (64, 64, 2, 7, 16),
    (80, 80, 3, 1, 32),
    (96, 128, 1, 8, 64),
    (128, 96, 2, 2, 128),
    (256, 256, 1, 2, 16),
    (20, 20, 2, 3, 16),
    (192, 72, 1, 19, 48),
    (3, 1, 1, 130, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_attention_shapes(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    d, dv, num_kv_heads, group, block_size = shape
    attention(dtype, d, dv, num_kv_heads, group, block_size).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 37},
        {"window": 600},
        {"softcap": 2.0},
        {"softcap": 50.0, "window": 64},
        {"causal": False},
        {"scale": 1.0},
        {"scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_paged_attention_options(
    isa: str, dtype: torch.dtype, options: dict[str, object], with_sinks: bool
) -> None:
    sinks = torch.tensor([-3.0, 0.0, 2.0, 30.0]) if with_sinks else None
    attention(dtype, sinks=sinks, **options).check()


def test_softcap_is_accurate_near_zero_and_when_saturated(isa: str) -> None:
    for softcap in (1e-3, 0.5, 5.0, 1e4):
        attention(head_dim=16, scale=1.0, softcap=softcap).check()


@pytest.mark.parametrize("shape", [(64, 64, 2, 7), (128, 128, 1, 4), (80, 80, 2, 1)], ids=str)
def test_bfloat16_is_as_exact_as_torchs_own(isa: str, shape: tuple[int, ...]) -> None:
    """In norm, beside the same attention in float64; a twentieth for the order of its tiles."""
    call = attention(torch.bfloat16, *shape, requests=((600, 600),), padding=0)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    theirs = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=call.scale, enable_gqa=True
    )
    exact = call.reference()[0]
    errors = [
        float((out.double() - exact).norm()) for out in (call.run()[0], theirs[0].transpose(0, 1))
    ]
    assert errors[0] <= 1.05 * errors[1]


def test_padding_rows_are_zero_and_nothing_is_written_for_them() -> None:
    out, _, _ = attention(padding=9).run()
    assert torch.equal(out[-9:], torch.zeros_like(out[-9:]))
    only = attention(requests=((0, 0), (0, 0)), padding=4)
    out, k_cache, _ = only.run()
    assert torch.equal(out, torch.zeros_like(out))
    assert k_cache.isnan().all()


def test_no_tokens() -> None:
    assert attention(requests=((5, 0),), padding=0).run()[0].shape == (0, 4, 64)


def test_blocks_behind_the_window_are_never_read(isa: str) -> None:
    call = attention(window=40, requests=((300, 1), (200, 30)))
    expected = call.run()[0]
    for b, oldest in enumerate((300 - 40, 200 - 30 - 40 + 1)):
        released = oldest // 16
        blocks = call.block_table[b, :released].long()
        call.k_cache[blocks], call.v_cache[blocks] = float("nan"), float("nan")
        call.block_table[b, :released] = -1
    assert torch.equal(call.run()[0], expected)


def test_infinite_and_nan_inputs_stay_in_their_request(isa: str) -> None:
    call = attention(requests=((40, 40), (33, 1)))
    clean = call.run()[0]
    call.q[3] = float("nan")
    out = call.run()[0]
    assert out[3].isnan().all()
    assert torch.equal(out[40:], clean[40:])
    assert torch.equal(out[:3], clean[:3])


def alone(call: Attention, request: int) -> Attention:
    """The same call with one of its requests only."""
    begin, end = call.query_start_loc[request : request + 2].tolist()
    rows = slice(begin, end)
    return replace(
        call,
        q=call.q[rows],
        k=call.k[rows],
        v=call.v[rows],
        slot_mapping=call.slot_mapping[rows],
        block_table=call.block_table[request : request + 1],
        seq_lens=call.seq_lens[request : request + 1],
        query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
    )


LONG = ((1300, 1), (1100, 160), (700, 700), (90, 1), (33, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "window"), [(1, 0), (7, 0), (3, 600)])
def test_bitwise_equal_in_any_batch(isa: str, dtype: torch.dtype, group: int, window: int) -> None:
    call = attention(dtype, 32, None, 2, group, requests=LONG, window=window)
    together = call.run()[0]
    for request in range(len(LONG)):
        begin, end = call.query_start_loc[request : request + 2].tolist()
        assert torch.equal(alone(call, request).run()[0], together[begin:end]), request


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_equal_in_any_chunks(isa: str, dtype: torch.dtype) -> None:
    call = attention(dtype, 24, 40, 1, 5, requests=((700, 700),), padding=0)
    whole = call.run()[0]
    k_cache, v_cache = pack_keys(call.k_cache), pack_values(call.v_cache)
    pieces, position = [], 0
    for size in (1, 63, 200, 7, 1, 1, 320, 107):
        rows = slice(position, position + size)
        position += size
        out = torch.ops.inlay_cpu.paged_attention(
            call.q[rows], call.k[rows], call.v[rows], k_cache, v_cache, call.slot_mapping[rows],
            call.block_table, torch.tensor([position], dtype=torch.int32),
            torch.tensor([0, size], dtype=torch.int32), call.scale, 0, 0.0, None,
        )  # fmt: skip
        pieces.append(out)
    assert position == 700
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("group", [1, 6, 40])
def test_bitwise_equal_for_any_number_of_threads(isa: str, group: int) -> None:
    call = attention(torch.bfloat16, 64, None, 1, group, requests=LONG)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([call.run()[0], *(alone(call, b).run()[0] for b in range(len(LONG)))])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_float16_conversion_of_every_value(isa: str) -> None:
    """One visible token: the output is V itself, which must survive both conversions."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].view(-1, 1, 8)
    every = torch.cat([every] * 2, dim=2)
    size = every.shape[0]
    blocks = -(-size // 16)
    call = Attention(
        every, every, every,
        torch.zeros(blocks, 1, 16, 16, dtype=torch.float16),
        torch.zeros(blocks, 1, 16, 16, dtype=torch.float16),
        torch.arange(size),
        torch.arange(blocks, dtype=torch.int32)[None],
        torch.tensor([size], dtype=torch.int32),
        torch.tensor([0, size], dtype=torch.int32),
        scale=0.0, window=1,
    )  # fmt: skip
    torch.testing.assert_close(call.run()[0], every, rtol=0, atol=0)


def change(call: Attention, name: str, **updates: object) -> Attention:
    tensor = getattr(call, name).clone()
    for index, value in updates["at"].items():  # type: ignore[attr-defined]
        tensor[index] = value
    return replace(call, **{name: tensor})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda c: replace(c, q=c.q.double()), "q must be float32, bfloat16 or float16, got Dou"),
        (lambda c: replace(c, v=c.v.half()), "v must have q's dtype Float, got Half"),
        (lambda c: replace(c, k_cache=c.k_cache.half()), "k_cache must have q's dtype"),
        (lambda c: replace(c, k=c.k[:, :, :32]), r"k must have shape \[\d+, -1, 64\]"),
        (lambda c: replace(c, q=c.q[:, :3]), "multiple of k's"),
        (lambda c: replace(c, v_cache=c.v_cache[:, :1]), "v_cache must have shape"),
        (lambda c: replace(c, v_cache=c.v_cache[:, :, :8]), "v_cache must have shape"),
        (lambda c: attention(block_size=8), "block size must be a multiple of 16, got 8"),
        (lambda c: replace(c, slot_mapping=c.slot_mapping.int()), "slot_mapping must be Long"),
        (lambda c: replace(c, slot_mapping=c.slot_mapping[1:]), "slot_mapping must have shape"),
        (lambda c: replace(c, seq_lens=c.seq_lens.long()), "seq_lens must be Int"),
        (lambda c: replace(c, block_table=c.block_table[:-1]), "block_table must have shape"),
        (
            lambda c: replace(c, block_table=c.block_table[:, :4].contiguous()),
            "block_table has 4 columns",
        ),
        (lambda c: replace(c, query_start_loc=c.query_start_loc[1:]), "query_start_loc must have"),
        (lambda c: replace(c, window=-1), "window must be"),
        (lambda c: replace(c, softcap=-1.0), "softcap must be"),
        (lambda c: replace(c, sinks=torch.zeros(3)), r"sinks must have shape \[4\]"),
        (lambda c: replace(c, chunk=-1), "chunk must be"),
        (lambda c: replace(c, slopes=torch.zeros(2)), r"slopes must have shape \[4\]"),
        (
            lambda c: replace(c, q=c.q.transpose(1, 2).contiguous().transpose(1, 2)),
            "contiguous in their last dimension",
        ),
        (
            lambda c: change(c, "slot_mapping", at={0: 10**6}),
            r"slot_mapping\[0\] is 1000000, the cache has \d+ slots",
        ),
        (lambda c: change(c, "block_table", at={(1, 2): 999}), r"block_table\[1, 2\] is 999"),
        (lambda c: change(c, "block_table", at={(1, 0): -1}), r"block_table\[1, 0\] is -1"),
        (lambda c: change(c, "seq_lens", at={0: 3}), "request 0 brings 7 tokens"),
        (lambda c: change(c, "query_start_loc", at={-1: 10**6}), "query_start_loc must ascend"),
        (lambda c: change(c, "query_start_loc", at={1: -1}), "query_start_loc must ascend"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(broken, message: str) -> None:
    call = broken(attention())
    k_cache, v_cache = call.k_cache.transpose(2, 3).contiguous(), call.v_cache.contiguous()
    before = k_cache.clone(), v_cache.clone()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.inlay_cpu.paged_attention(
            call.q, call.k, call.v, k_cache, v_cache, call.slot_mapping, call.block_table,
            call.seq_lens, call.query_start_loc, call.scale, call.window, call.softcap, call.sinks,
            call.causal, call.chunk, call.slopes,
        )  # fmt: skip
    torch.testing.assert_close((k_cache, v_cache), before, rtol=0, atol=0, equal_nan=True)


def test_isa_names_are_checked() -> None:
    with pytest.raises(RuntimeError, match=r"auto.*portable; got 'sse9'"):
        torch.ops.inlay_cpu.set_isa("sse9")
    torch.ops.inlay_cpu.set_isa("portable")
    assert torch.ops.inlay_cpu.get_isa() == "portable"
    torch.ops.inlay_cpu.set_isa("auto")
    assert torch.ops.inlay_cpu.get_isa() in ISAS


# --- linear ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (2,), (1, 5), (2, 3, 7)])
def test_linear(dtype: torch.dtype, bias: bool, leading: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(67, 45).to(dtype), torch.randn(*leading, 45).to(dtype)
    offset = torch.randn(67).to(dtype) if bias else None
    handle = torch.ops.inlay_cpu.pack_linear(weight)
    weight_copy = weight.clone()
    weight.fill_(float("nan"))  # the handle must not need it any more
    out = torch.ops.inlay_cpu.linear(x, handle, offset, 67)
    expected = F.linear(
        x.double(), weight_copy.double(), None if offset is None else offset.double()
    )
    # sums of 45 products in float32 (oneDNN may hold float16 sums in float32 too), one rounding
    torch.testing.assert_close(out.double(), expected, rtol=RTOL[dtype], atol=2e-4)
    assert out.dtype == dtype
    assert torch.ops.inlay_cpu.packed_nbytes(handle) >= 67 * 45 * dtype.itemsize
    assert torch.ops.inlay_cpu.packed_format(handle) in ("onednn", "plain", "pairs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1152, 896), (64, 4864), (300, 200)], ids=str)
def test_linear_rows_do_not_depend_on_the_batch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(512, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    handle = torch.ops.inlay_cpu.pack_linear(weight)
    whole = torch.ops.inlay_cpu.linear(x, handle, None, shape[0])
    for size in (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 256):
        part = torch.ops.inlay_cpu.linear(x[:size], handle, None, shape[0])
        if dtype == torch.float32:
            assert torch.equal(part, whole[:size]), size
        else:
            # oneDNN's AMX kernels, and ours for the smallest batches, sum in another order than
            # its large blocks: now and then a float32 sum rounds to the other bfloat16 neighbour.
            assert (part != whole[:size]).double().mean() <= 2e-3, size
            torch.testing.assert_close(part, whole[:size], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("rows", [*range(1, 8), 37])
@pytest.mark.parametrize(
    "shape", [(1152, 896), (32, 2), (64, 4864), (96, 30), (33, 64), (8, 8), (1, 1), (39, 45)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_as_exact_as_a_cast(rows: int, shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    bias = torch.randn(shape[0]).bfloat16() if biased else None
    handle = torch.ops.inlay_cpu.pack_linear(weight)
    out = torch.ops.inlay_cpu.linear(x, handle, bias, shape[0]).double()
    exact = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    assert torch.ops.inlay_cpu.linear(x[:0], handle, bias, shape[0]).shape == (0, shape[0])
    # Float32 sums, then one rounding to bfloat16: half a unit in the last of 8 bits; the sum's own
    # error shows where terms cancel, so it is taken against the size of the terms.
    scale = exact.abs() * 2**-8 + x.double().norm() * weight.double().norm(dim=1) * 2**-20
    assert ((out - exact).abs() <= scale).all()


def test_avx2_takes_bfloat16_of_any_size() -> None:
    """What is packed for it stays its own, whatever runs later; NaN stays in its row and output."""
    ops = torch.ops.inlay_cpu
    try:
        ops.set_isa("avx2")
    except RuntimeError as error:
        pytest.skip(str(error))
    weight, x = torch.randn(67, 45).bfloat16(), torch.randn(9, 45).bfloat16()
    try:
        handle = ops.pack_linear(weight)
    finally:
        ops.set_isa("auto")
    assert ops.packed_format(handle) == "pairs"
    clean = ops.linear(x, handle, None, 67)
    exact = x.double() @ weight.double().t()
    terms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    assert ((clean.double() - exact).abs() <= exact.abs() * 2**-8 + terms * 2**-20).all()
    x[3, 44], x[4, 0] = float("nan"), float("inf")
    out = ops.linear(x, handle, None, 67)
    assert out[3].isnan().all()
    assert not out[4].isfinite().any()
    rest = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(out[rest], clean[rest])


@pytest.mark.parametrize("bias", [torch.zeros(64), torch.zeros(1).bfloat16()])
def test_linear_refuses_a_bias_that_is_not_like_its_outputs(bias: torch.Tensor) -> None:
    handle = torch.ops.inlay_cpu.pack_linear(torch.ones(64, 32).bfloat16())
    with pytest.raises(RuntimeError, match=r"bias must be \[64\] and BFloat16 like x, got"):
        torch.ops.inlay_cpu.linear(torch.ones(2, 32).bfloat16(), handle, bias, 64)


def test_linear_refuses_what_is_not_a_handle() -> None:
    handle = torch.ops.inlay_cpu.pack_linear(torch.randn(6, 4))
    linear, x = torch.ops.inlay_cpu.linear, torch.randn(2, 4)
    for wrong in (torch.zeros(4, dtype=torch.int64), torch.randn(6, 4), handle[:2]):
        with pytest.raises(RuntimeError, match="made by inlay_cpu::pack_linear"):
            linear(x, wrong, None, 6)
    with pytest.raises(RuntimeError, match="a copy of another"):
        linear(x, handle.clone(), None, 6)
    with pytest.raises(RuntimeError, match=r"the packed weight is \[6, 4\].*out_features 5"):
        linear(x, handle, None, 5)
    with pytest.raises(RuntimeError, match=r"the packed weight is \[6, 4\].*\[2, 3\]"):
        linear(x[:, :3], handle, None, 6)
    with pytest.raises(RuntimeError, match="weight's dtype Float, got Double"):
        linear(x.double(), handle, None, 6)
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16"):
        torch.ops.inlay_cpu.pack_linear(torch.randn(6, 4).double())
    with pytest.raises(RuntimeError, match=r"weight must be \[out_features, in_features\]"):
        torch.ops.inlay_cpu.pack_linear(torch.randn(6))


def test_a_handle_owns_its_weight() -> None:
    """Memory of handles that are gone is given back."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    weight = torch.randn(2048, 1024)
    torch.ops.inlay_cpu.pack_linear(weight)
    before = resident()
    for _ in range(20):
        torch.ops.inlay_cpu.pack_linear(weight)
    assert resident() - before < 5 * weight.nbytes


# --- compilers -------------------------------------------------------------------------------


class _Layer(torch.nn.Module):
    def forward(self, x, handle, bias, k_cache, v_cache, slots, table, lens, starts):
        qkv = torch.ops.inlay_cpu.linear(x, handle, bias, 192).view(-1, 3, 4, 16)
        q, k, v = qkv.unbind(1)
        out = torch.ops.inlay_cpu.paged_attention(
            q, k, v, k_cache, v_cache, slots, table, lens, starts, 0.25, 0, 0.0, None
        )
        return F.silu(out.flatten(1))


def _layer_arguments(num_tokens: int, handle: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(num_tokens, 32),
        handle,
        torch.randn(192),
        torch.zeros(9, 4, 16, 16),
        torch.zeros(9, 4, 16, 16),
        torch.arange(num_tokens) + 16,
        torch.arange(1, 9, dtype=torch.int32)[None],
        torch.tensor([num_tokens], dtype=torch.int32),
        torch.tensor([0, num_tokens], dtype=torch.int32),
    )


@torch.no_grad()
def test_aot_inductor_round_trip_with_a_dynamic_number_of_tokens(tmp_path: Path) -> None:
    handle = torch.ops.inlay_cpu.pack_linear(torch.randn(192, 32))
    size = {0: torch.export.Dim("T", min=2, max=128)}
    dynamic = (size, None, None, None, None, size, None, None, None)
    program = torch.export.export(
        _Layer(), _layer_arguments(8, handle), dynamic_shapes=dynamic, strict=False
    )
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "layer.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    compiled = torch._C._aoti.AOTIModelPackageLoader(package, "model", False, 1, -1)
    for num_tokens in (2, 33, 128):
        args = _layer_arguments(num_tokens, handle)
        copies = [x if x is handle else x.clone() for x in args]
        torch.testing.assert_close(compiled.run(list(args))[0], _Layer()(*copies))
        torch.testing.assert_close(args[3:5], tuple(copies[3:5]), rtol=0, atol=0)
        assert args[3].any()  # the caller's own cache was written


# --- building and loading --------------------------------------------------------------------


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+.*apt install.*backend='eager'"):
        cpu_ops.build_ops(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -pipe")
    with pytest.raises(BuildError, match=r"CXX=no-such-compiler -pipe was found"):
        cpu_ops.build_ops(tmp_path)


def _fake_compiler(directory: Path, body: str) -> str:
    script = directory / "fake-cxx"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_failing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = "for i in $(seq 99); do echo line $i >&2; done; exit 3"
    monkeypatch.setenv("CXX", _fake_compiler(tmp_path, body))
    with pytest.raises(BuildError, match=r"status 3") as caught:
        cpu_ops.build_ops(tmp_path / "cache")
    message = str(caught.value)
    assert "line 99" in message
    assert "line 50" not in message
    assert "fake-cxx -std=c++20" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="INLAY_CACHE_DIR"):
        cpu_ops.build_ops(tmp_path / "file" / "ops")


def test_processes_that_build_at_once(tmp_path: Path) -> None:
    """Each writes its whole library, slowly; both must end with one whole library."""
    write = "for i in 1 2 3 4; do echo $i; sleep 0.1; done > $2"
    body = f'while [ "$1" != -o ]; do shift; done; {write}'
    environment = {**os.environ, "CXX": _fake_compiler(tmp_path, body)}
    code = (
        "import sys; from pathlib import Path; from inlay.backends.kernels.cpu_ops import *;"
        "print(build_ops(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert [str(path) for path in (tmp_path / "cache").iterdir()] == [*paths]
    assert Path(*paths).read_text() == "1\n2\n3\n4\n"


def test_cached_library_is_reused_and_flags_change_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = f'echo call >> {tmp_path}/calls; while [ "$1" != -o ]; do shift; done; echo > $2'
    monkeypatch.setenv("CXX", _fake_compiler(tmp_path, body))
    first = cpu_ops.build_ops(tmp_path / "cache")
    calls = (tmp_path / "calls").read_text()
    assert cpu_ops.build_ops(tmp_path / "cache") == first
    assert (tmp_path / "calls").read_text() == calls
    monkeypatch.setattr(cpu_ops, "INTERFACE", 99)
    assert cpu_ops.build_ops(tmp_path / "cache") != first


def test_loading_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = cpu_ops.build_ops()
    copy = tmp_path / "copied.so"
    copy.write_bytes(built.read_bytes())
    cpu_ops.load_ops(copy)
    assert not caplog.records
    copy.write_bytes(f"...inlay_cpu/{cpu_ops.INTERFACE}/{'0' * 16}...".encode())
    cpu_ops.load_ops(copy)
    assert "0" * 16 in caplog.text
    copy.write_bytes(f"...inlay_cpu/77/{'0' * 16}...".encode())
    with pytest.raises(BuildError, match="interface 77 of the CPU ops, this process has loaded"):
        cpu_ops.load_ops(copy)
    copy.write_bytes(b"something else")
    with pytest.raises(BuildError, match="not a library of inlay's CPU ops"):
        cpu_ops.load_ops(copy)


def test_a_copy_loads_without_a_compiler_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    copy, foreign = tmp_path / "copied.so", tmp_path / "foreign.so"
    copy.write_bytes(cpu_ops.build_ops().read_bytes())
    foreign.write_bytes(f"...inlay_cpu/{cpu_ops.INTERFACE}/{'0' * 16}...".encode())
    code = f"""
from pathlib import Path
from inlay.backends.kernels.cpu_ops import load_ops
from inlay.errors import BuildError
import torch
try:
    load_ops(Path({str(foreign)!r}))
except BuildError as error:
    assert "rebuild the artifact here" in str(error)
load_ops(Path({str(copy)!r}))
print(torch.ops.inlay_cpu.get_isa())
"""
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ISAS


def test_parallel_on_torchs_own_openmp() -> None:
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or "openmp" not in torch.__config__.parallel_info().lower():
        pytest.skip("looks at Linux's memory maps for OpenMP")
    assert b"GOMP_parallel" in cpu_ops.build_ops().read_bytes()
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line}
    runtimes = {path for path in runtimes if Path(path).name.startswith(("libgomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes
