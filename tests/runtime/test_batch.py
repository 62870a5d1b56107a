from __future__ import annotations

import numpy as np
import torch

from inlay.runtime.batch import StepSizes, prepare
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import ScheduledRequest
from tests.runtime.fake_model import LIMITS


def make_request(tokens: list[int], num_prompt: int, num_computed: int, slot: int) -> Request:
    request = Request("r", tokens[:num_prompt], SamplingParams(), 0, frozenset(), frozenset(), 60)
    request.token_ids = tokens
    request.num_computed_tokens, request.slot = num_computed, slot
    return request


def test_a_mixed_step() -> None:
    """A decode in slot 2, a chunk in the middle of a prompt in slot 0, a prompt's end in slot 1."""
    cache = KVCache(2, 40, block_size=4, max_num_seqs=3, max_seq_len=60)
    for slot in (1, 2, 0):
        assert cache.allocate(slot, 20)
    decode = make_request([7, 8, 9, 50], num_prompt=3, num_computed=3, slot=2)
    chunk = make_request(list(range(10, 30)), num_prompt=20, num_computed=5, slot=0)
    last = make_request(list(range(40, 46)), num_prompt=6, num_computed=5, slot=1)
    scheduled = [ScheduledRequest(decode, 1), ScheduledRequest(chunk, 4), ScheduledRequest(last, 1)]
    last_tokens = torch.tensor([-5, -6, 77])
    batch = prepare(scheduled, cache, last_tokens, StepSizes.within(LIMITS))
    step = batch.step
    assert step.input_ids.tolist() == [77, 15, 16, 17, 18, 45, 0, 0]
    assert step.position_ids.tolist() == [3, 5, 6, 7, 8, 5, 0, 0]
    assert step.seq_lens.tolist() == [4, 9, 6, 0]
    assert (step.num_tokens, step.num_requests, step.num_logits) == (6, 3, 2)
    assert step.logits_indices[:2].tolist() == [0, 5]
    for group in range(2):
        table = cache.table(0, 9)[group]
        assert step.block_tables[group, 1].tolist() == table.tolist()
        slots = [int(table[p // 4]) * 4 + p % 4 for p in range(5, 9)]
        assert step.slot_mapping[group, 1:5].tolist() == slots
    assert batch.sampled == [decode, last]
    np.testing.assert_array_equal(batch.slots, [2, 1])
    np.testing.assert_array_equal(batch.positions, [4, 6])


def test_nothing_to_sample_after_a_chunk() -> None:
    cache = KVCache(1, 40, block_size=4, max_num_seqs=3, max_seq_len=60)
    cache.allocate(0, 20)
    chunk = make_request(list(range(20)), num_prompt=20, num_computed=0, slot=0)
    batch = prepare(
        [ScheduledRequest(chunk, 5)], cache, torch.zeros(3).long(), StepSizes.within(LIMITS)
    )
    assert batch.sampled == []
    assert batch.slots.shape == batch.positions.shape == (0,)
    assert batch.step.input_ids.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
