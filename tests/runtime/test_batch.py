from __future__ import annotations

import numpy as np
import pytest
import torch

from inlay.backends.base import ModelLimits
from inlay.runtime.batch import MAX_PROMPT_LOGITS, StepSizes, prepare
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import UNKNOWN_TOKEN, Request
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import ScheduledRequest
from tests.runtime.fake_model import LIMITS


def make_cache() -> KVCache:
    cache = KVCache([40, 30], [0, 5], block_size=4, max_num_seqs=3, max_seq_len=60)
    for slot in (1, 2, 0):
        cache.allocate(slot, 20)
    return cache


def item(
    tokens: list[int], num_prompt: int, start: int, count: int, slot: int, every: bool = False
) -> ScheduledRequest:
    request = Request("r", tokens[:num_prompt], SamplingParams(), 0, frozenset(), frozenset(), 60)
    request.token_ids, request.slot, request.num_computed_tokens = tokens, slot, start
    return ScheduledRequest(request, start, count, 0, start + count == len(tokens), every)


def test_a_mixed_step() -> None:
    """A decode in slot 2, a chunk in the middle of a prompt in slot 0, a prompt's end in slot 1."""
    cache = make_cache()
    decode = item([7, 8, 9, UNKNOWN_TOKEN], num_prompt=3, start=3, count=1, slot=2)
    chunk = item(list(range(10, 30)), num_prompt=20, start=5, count=4, slot=0)
    last = item(list(range(40, 46)), num_prompt=6, start=5, count=1, slot=1)
    batch = prepare([decode, chunk, last], cache, StepSizes.within(LIMITS))
    step = batch.step
    assert step.input_ids.tolist() == [0, 15, 16, 17, 18, 45, 45, 45]
    batch.fill_in(step, torch.tensor([-5, -6, 77]))
    assert step.input_ids.tolist() == [77, 15, 16, 17, 18, 45, 45, 45]
    assert decode.request.token_ids[-1] == UNKNOWN_TOKEN, "the request is left as it was"
    assert step.position_ids.tolist() == [3, 5, 6, 7, 8, 5, 5, 5]
    assert step.seq_lens.tolist() == [4, 9, 6, 0]
    assert (step.num_tokens, step.num_requests, step.num_logits) == (6, 3, 2)
    assert step.logits_indices[:2].tolist() == [0, 5]
    for group in range(2):
        table = cache.table(0, 9)[group]
        assert step.block_tables[group, 1].tolist() == table.tolist()
        slots = [int(table[p // 4]) * 4 + p % 4 for p in range(5, 9)]
        assert step.slot_mapping[group, 1:5].tolist() == slots
    assert batch.rows == [0, -1, 1]


def test_tokens_that_the_host_knows_are_not_taken_from_the_device() -> None:
    known = item([7, 8, 9, 50], num_prompt=3, start=3, count=1, slot=2)
    batch = prepare([known], make_cache(), StepSizes.within(LIMITS))
    batch.fill_in(batch.step, torch.tensor([-5, -6, 77]))
    assert batch.step.input_ids.tolist() == [50, 50]


def test_padding_repeats_a_token_that_only_the_device_knows() -> None:
    waiting = item([7, 8, 9, UNKNOWN_TOKEN], num_prompt=3, start=3, count=1, slot=2)
    batch = prepare([waiting], make_cache(), StepSizes.within(LIMITS))
    batch.fill_in(batch.step, torch.tensor([-5, -6, 77]))
    assert batch.step.input_ids.tolist() == [77, 77]


def test_nothing_to_sample_after_a_chunk() -> None:
    chunk = item(list(range(20)), num_prompt=20, start=0, count=5, slot=0)
    batch = prepare([chunk], make_cache(), StepSizes.within(LIMITS))
    assert batch.rows == [-1]
    assert batch.step.num_logits == 0
    assert batch.step.input_ids.tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_rows_of_prompts_whose_every_logit_is_wanted() -> None:
    """The row that is sampled from is a request's last one."""
    cache = make_cache()
    every = item(list(range(6)), num_prompt=6, start=0, count=6, slot=0, every=True)
    chunk = item(list(range(20)), num_prompt=20, start=4, count=3, slot=1, every=True)
    last = item([7, 8, 9, 50], num_prompt=3, start=3, count=1, slot=2)
    batch = prepare([last, every, chunk], cache, StepSizes.within(LIMITS))
    assert batch.rows == [0, 6, 9]
    assert batch.step.num_logits == 10
    assert batch.step.logits_indices[:10].tolist() == [0, *range(1, 7), *range(7, 10)]


def test_what_a_window_has_passed_is_zero_in_the_step() -> None:
    cache = make_cache()
    table = cache.table(0, 20).copy()
    cache.release(0, 19)  # the token at 19 looks back to 15
    step = prepare([item(list(range(20)), 10, 19, 1, 0)], cache, StepSizes.within(LIMITS)).step
    np.testing.assert_array_equal(step.block_tables[0, 0], table[0])
    assert step.block_tables[1, 0].tolist() == [0, 0, 0, table[1, 3], table[1, 4]]


@pytest.mark.parametrize("max_num_seqs", [1, 6, 300])
def test_sizes_of_every_step_there_may_be(max_num_seqs: int) -> None:
    limits = ModelLimits(97, 512, max(max_num_seqs, 24), max_num_seqs, 4)
    sizes = StepSizes.within(limits)
    assert sizes.tokens[-1] == limits.max_num_tokens
    assert (sizes.requests[0], sizes.requests[-1]) == (1, max_num_seqs)
    assert sizes.logits[-1] == max(max_num_seqs, MAX_PROMPT_LOGITS)
    assert list(sizes.logits) == sorted(set(sizes.logits))
