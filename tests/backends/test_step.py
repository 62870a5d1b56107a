"""The ragged batch against a loop that writes it out token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.backends.step import (
    PADDING_SLOT,
    SMALLEST,
    StepInputs,
    StepRequest,
    build_step,
    ladder_up_to,
    round_up,
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[StepRequest], int]:
    """Requests with blocks of their own in every group, and the block size."""
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    num_groups = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=6))
    needed = [
        -(-(new + computed) // block_size) + draw(st.integers(0, 2)) for new, computed in sizes
    ]
    total = sum(needed)
    shuffled = [
        draw(st.permutations(range(total))) if total < 30 else list(range(total))[::-1]
        for _ in range(num_groups)
    ]
    requests, start = [], 0
    for (new, computed), count in zip(sizes, needed, strict=True):
        tables = [blocks[start : start + count] for blocks in shuffled]
        ids = draw(st.lists(st.integers(0, 99), min_size=new, max_size=new))
        requests.append(StepRequest(ids, computed, tables, draw(st.booleans())))
        start += count
    return requests, block_size


def naive(requests: list[StepRequest], block_size: int, step: StepInputs) -> None:
    """Assert every entry of the real part of a step, one at a time."""
    token = 0
    wanted = []
    for b, request in enumerate(requests):
        assert step.query_start_loc[b] == token
        for offset, token_id in enumerate(request.token_ids):
            position = request.num_computed_tokens + offset
            assert step.input_ids[token] == token_id
            assert step.position_ids[token] == position
            for g, table in enumerate(request.block_tables):
                block, inside = table[position // block_size], position % block_size
                assert step.slot_mapping[g, token] == block * block_size + inside
            token += 1
        assert step.query_start_loc[b + 1] == token
        assert step.seq_lens[b] == request.num_computed_tokens + len(request.token_ids)
        for g, table in enumerate(request.block_tables):
            assert step.block_tables[g, b, : len(table)].tolist() == list(table)
        if request.needs_logits:
            wanted.append(token - 1)
    assert step.logits_indices[: len(wanted)].tolist() == wanted
    assert (step.num_tokens, step.num_requests) == (token, len(requests))
    assert step.num_logits == len(wanted)


def assert_padding(step: StepInputs) -> None:
    """What is beyond the real part belongs to nobody and is written nowhere."""
    assert (step.slot_mapping[:, step.num_tokens :] == PADDING_SLOT).all()
    assert (step.slot_mapping[:, : step.num_tokens] >= 0).all()
    for ids in (step.input_ids, step.position_ids):
        assert (ids[step.num_tokens :] == ids[step.num_tokens - 1]).all()
    assert (step.seq_lens[step.num_requests :] == 0).all()
    assert (step.query_start_loc[step.num_requests :] == step.num_tokens).all()
    last = step.logits_indices[step.num_logits - 1] if step.num_logits else 0
    assert (step.logits_indices[step.num_logits :] == last).all()
    assert (step.logits_indices < len(step.input_ids)).all()


@given(batch=batches(), more=st.tuples(*[st.integers(0, 20)] * 3))
def test_against_a_naive_loop(
    batch: tuple[list[StepRequest], int], more: tuple[int, int, int]
) -> None:
    requests, block_size = batch
    num_tokens = sum(len(r.token_ids) for r in requests)
    num_logits = sum(r.needs_logits for r in requests)
    step = build_step(
        requests,
        block_size,
        num_tokens=num_tokens + more[0],
        num_requests=len(requests) + more[1],
        num_logits=num_logits + more[2],
    )
    naive(requests, block_size, step)
    assert_padding(step)
    assert len(step.input_ids) == len(step.position_ids) == step.slot_mapping.shape[1]
    assert len(step.input_ids) == max(num_tokens + more[0], SMALLEST)
    assert len(step.seq_lens) == len(step.query_start_loc) - 1 == step.block_tables.shape[1]
    assert len(step.seq_lens) == len(requests) + more[1]
    assert len(step.logits_indices) == max(num_logits + more[2], SMALLEST)
    slots = step.slot_mapping[:, : step.num_tokens]
    for row in slots:
        assert len(set(row.tolist())) == len(row), "two tokens write one slot"
    plain = build_step(requests, block_size)
    naive(requests, block_size, plain)
    assert_padding(plain)


def test_dtypes() -> None:
    step = build_step([StepRequest([1, 2, 3], 0, [[0]])], 4)
    wide = (step.input_ids, step.position_ids, step.slot_mapping, step.logits_indices)
    narrow = (step.block_tables, step.seq_lens, step.query_start_loc)
    assert {t.dtype for t in wide} == {torch.int64}
    assert {t.dtype for t in narrow} == {torch.int32}
    moved = step.to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.block_tables.device.type == "meta"
    assert (moved.num_tokens, moved.num_logits) == (3, 1)


def test_one_token_is_padded_to_two() -> None:
    step = build_step([StepRequest([7], 5, [[2, 3]])], 4)
    assert step.input_ids.tolist() == [7, 7]
    assert step.position_ids.tolist() == [5, 5]
    assert step.slot_mapping.tolist() == [[3 * 4 + 1, PADDING_SLOT]]
    assert step.logits_indices.tolist() == [0, 0]


def test_what_the_scheduler_must_not_ask_for() -> None:
    with pytest.raises(AssertionError, match="request 1: 1 blocks, 2 needed"):
        build_step([StepRequest([1], 0, [[0]]), StepRequest([1], 4, [[1]])], 4)
    with pytest.raises(AssertionError, match="at least one request"):
        build_step([], 4)
    with pytest.raises(AssertionError, match="3 tokens do not fit 2"):
        build_step([StepRequest([1, 2, 3], 0, [[0]])], 4, num_tokens=2)


def test_tables_may_be_arrays() -> None:
    tables = np.array([[4, 1], [0, 3]], dtype=np.int32)
    request = StepRequest([1, 2, 3, 4, 5], 0, tables)
    step = build_step([request], 4)
    assert step.slot_mapping.tolist() == [[16, 17, 18, 19, 4], [0, 1, 2, 3, 12]]


@given(limit=st.integers(1, 5000), smallest=st.sampled_from([1, 2, 4]))
def test_ladders(limit: int, smallest: int) -> None:
    ladder = ladder_up_to(limit, smallest)
    assert ladder == sorted(set(ladder))
    assert ladder[0] == smallest
    assert ladder[-1] == max(limit, smallest)
    # Padding never more than doubles a step, nor adds more than 256 tokens.
    for low, high in pairwise(ladder):
        assert high <= 2 * low
        assert high - low <= 256
    # Few shapes in all: each costs the libraries below some set-up.
    assert len(ladder) <= 40 + limit // 256


@given(value=st.integers(1, 3000), limit=st.integers(1, 2500))
def test_rounding_up(value: int, limit: int) -> None:
    ladder = ladder_up_to(limit)
    rounded = round_up(value, ladder)
    assert rounded == next((rung for rung in ladder if rung >= value), value)
    assert round_up(rounded, ladder) == rounded


def test_on_cuda_there_is_one_copy_and_it_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, bool]] = []
    empty = torch.empty

    def allocate(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        calls.append(("pinned", pin_memory))
        return empty(size, dtype=dtype)

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append((device.type, non_blocking))
        return tensor

    step = build_step([StepRequest([1, 2, 3], 0, [[0], [1]]), StepRequest([4], 5, [[2], [3]])], 8)
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "to", to)
    sent = step.to(torch.device("cuda"))
    assert calls == [("pinned", True), ("cuda", True)]
    for name, tensor in vars(step).items():
        if torch.is_tensor(tensor):
            assert torch.equal(getattr(sent, name), tensor), name
            assert getattr(sent, name).dtype == tensor.dtype
            assert getattr(sent, name).data_ptr() % 16 == 0, "compiled code would copy it"
