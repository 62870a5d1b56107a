"""Attention as plain tensor ops against the reference op, over shared, shuffled, padded caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from inlay.backends import gathered_attention
from inlay.backends.eager.backend import ReferenceAttention
from inlay.backends.gathered_attention import GatheredAttention
from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep
from inlay.backends.step import StepInputs, StepRequest, build_step
from inlay.passes.kv_formats import KV_CACHE_DTYPES

BLOCK_SIZE, NUM_BLOCKS = 4, 24
STEP = AttentionStep(
    layer=0, group=0, cache=0, query="q", key="k", value="v", output="o",
    num_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=12, scale=0.3,
)  # fmt: skip
OPTIONS = [
    {},
    {"window": 5},
    {"chunk": 6},
    {"softcap": 2.0},
    {"sinks": "s"},
    {"slopes": "a"},
    {"window": 7, "softcap": 3.0, "sinks": "s"},
]


def make_step(*sizes: tuple[int, int], **padded: int) -> StepInputs:
    """Requests of (tokens in the cache after the step, new tokens), blocks far from in order."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    requests = []
    for length, new in sizes:
        table = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
        requests.append(StepRequest([1] * new, length - new, [table]))
    return build_step(requests, BLOCK_SIZE, **padded)


MIXED = make_step((9, 9), (13, 1), (6, 3), (1, 1), num_tokens=19, num_requests=7)
DECODE = make_step((9, 1), (13, 1), (2, 1))


def run(
    op: GatheredAttention | ReferenceAttention,
    call: AttentionStep,
    step: StepInputs,
    kv: torch.dtype,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, LayerCache]:
    """The result and the cache, which held the same old tokens before; garbage elsewhere."""
    cache = op.allocate(call, NUM_BLOCKS, BLOCK_SIZE, kv)
    generator = torch.Generator().manual_seed(5)
    shapes = [(call.num_heads, call.head_dim), (2, call.head_dim), (2, call.v_head_dim)]
    tokens = step.input_ids.shape[0]
    q, k, v = (torch.randn(tokens, *s, generator=generator).to(dtype) for s in shapes)
    old = [torch.randn(NUM_BLOCKS, 2, BLOCK_SIZE, s[-1], generator=generator) for s in shapes[1:]]
    owned = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, dtype=torch.bool)
    for table, length in zip(step.block_tables[0], step.seq_lens, strict=True):
        positions = torch.arange(int(length))
        owned[table[positions // BLOCK_SIZE].long(), positions % BLOCK_SIZE] = True
    for tensor, values in zip(cache[:2], old, strict=True):
        assert tensor is not None
        filler = torch.nan if kv.is_floating_point else 127
        values = values if kv.is_floating_point else values * 40
        tensor.copy_(torch.where(owned[:, None, :, None], values, filler).to(kv))
    if kv == torch.int8:
        for scales in cache[2:]:
            assert scales is not None
            scales.copy_(torch.where(owned[:, None], 0.02, torch.nan).expand_as(scales))
    weights = torch.linspace(0.1, 1.0, call.num_heads)
    out = op(
        call, q, k, v, cache, step.slot_mapping[0], step.block_tables[0], step.seq_lens,
        step.query_start_loc, weights if call.sinks else None, weights if call.slopes else None,
    )  # fmt: skip
    return out[: step.num_tokens], cache


def assert_like_reference(
    call: AttentionStep, step: StepInputs, kv: torch.dtype, dtype: torch.dtype = torch.float32
) -> None:
    expected, right = run(ReferenceAttention(), call, step, kv, dtype)
    got, cache = run(GatheredAttention(torch.device("cpu")), call, step, kv, dtype)
    # The same formulas in float32, summed in another order; in bfloat16 the result is rounded once.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert expected.abs().max() > 0.1
    for mine, theirs in zip(cache, right, strict=True):
        if theirs is not None:
            assert mine is not None
            assert torch.equal(mine.float().nan_to_num(77), theirs.float().nan_to_num(77))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
def test_like_the_reference(options: dict, step: StepInputs) -> None:
    assert_like_reference(replace(STEP, **options), step, torch.float32)


@pytest.mark.parametrize("kv", KV_CACHE_DTYPES.values(), ids=str)
def test_every_cache_dtype(kv: torch.dtype) -> None:
    assert_like_reference(STEP, MIXED, kv, torch.bfloat16)


@pytest.mark.parametrize("options", [{}, {"window": 3}], ids=str)
def test_encoders_see_both_sides(options: dict) -> None:
    step = make_step((9, 9), (5, 5), num_requests=4)
    assert_like_reference(replace(STEP, causal=False, **options), step, torch.float32)


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "GATHERED_BYTES", 3 * 16 * 2 * 20 * 4)
    assert_like_reference(STEP, MIXED, torch.float32)


def test_a_window_off_by_one_is_seen() -> None:
    dtype, gathered = torch.float32, GatheredAttention(torch.device("cpu"))
    right, _ = run(ReferenceAttention(), replace(STEP, window=5), MIXED, dtype, dtype)
    wrong, _ = run(gathered, replace(STEP, window=6), MIXED, dtype, dtype)
    assert (right - wrong).abs().max() > 1e-2


def test_it_asks_the_device_for_no_number() -> None:
    """On the meta device a number cannot be asked for, as it cannot within a CUDA graph."""
    meta = torch.device("meta")
    op = GatheredAttention(meta)
    cache = op.allocate(STEP, NUM_BLOCKS, BLOCK_SIZE, torch.bfloat16)
    step = MIXED.to(meta)
    q, k, v = (
        torch.empty(19, *shape, dtype=torch.bfloat16, device=meta)
        for shape in ((6, 8), (2, 8), (2, 12))
    )
    out = op(
        STEP, q, k, v, cache, step.slot_mapping[0], step.block_tables[0], step.seq_lens,
        step.query_start_loc, None, None,
    )  # fmt: skip
    assert out.shape == (19, 6, 12)
