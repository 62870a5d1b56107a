from __future__ import annotations

import logging

import pytest
import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.errors import OptionError
from inlay.runtime import memory
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.memory import num_host_blocks, num_kv_blocks

CPU = torch.device("cpu")
LIMITS = ModelLimits(vocab_size=10, max_seq_len=30, max_num_tokens=32, max_num_seqs=8, block_size=4)
GROUPS = (KVGroup(0, 2, 3000), KVGroup(16, 4, 5000))


# 8 requests, each with at most 15 + 2 * 30 tokens of the window and one block more.
MOST = 8 * (19 + 1)


def blocks(config: ExecutorConfig, limits: ModelLimits = LIMITS) -> list[int]:
    return num_kv_blocks(config, limits, GROUPS, CPU)


def test_default_is_room_for_all_requests() -> None:
    """8 requests of 30 tokens are 8 blocks each: the machine running this has 2 MB to spare."""
    assert blocks(ExecutorConfig()) == [64, 64]


def test_default_takes_a_quarter_of_the_free_memory_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * (10 * 8000 + 7999))
    assert blocks(ExecutorConfig()) == [10, 10]


def test_what_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    config = ExecutorConfig(kv_cache_free_fraction=0.5)
    assert num_kv_blocks(config, LIMITS, GROUPS, CPU, taken=0) == [6, 6]
    assert num_kv_blocks(config, LIMITS, GROUPS, CPU, taken=36_000) == [4, 4]


def test_sizes_in_tokens_and_bytes() -> None:
    assert blocks(ExecutorConfig(kv_cache_tokens=1)) == [1, 1]
    assert blocks(ExecutorConfig(kv_cache_tokens=401)) == [101, 101]
    assert blocks(ExecutorConfig(kv_cache_memory=8000)) == [1, 1]
    assert blocks(ExecutorConfig(kv_cache_memory=8000 * 100 - 1)) == [99, 99]


def test_a_window_gets_no_more_than_requests_can_fill() -> None:
    """What it does not need is the other group's."""
    assert blocks(ExecutorConfig(kv_cache_tokens=4 * 1000)) == [1000, MOST]
    budget = MOST * 5000 + 400 * 3000
    assert blocks(ExecutorConfig(kv_cache_memory=budget)) == [400, MOST]
    assert blocks(ExecutorConfig(kv_cache_memory=budget - 1)) == [399, MOST]


def test_a_share_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks beyond what can run at once are for prefixes."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 10 * (MOST * 5000 + 500 * 3000))
    assert blocks(ExecutorConfig(kv_cache_free_fraction=0.1)) == [500, MOST]
    assert blocks(ExecutorConfig()) == [64, 64]


def test_the_host_tier_shares_its_bytes_as_the_device_does() -> None:
    assert num_host_blocks(ExecutorConfig(), GROUPS) == [0, 0]
    config = ExecutorConfig(host_cache_memory=8000 * 7 + 7999)
    assert num_host_blocks(config, GROUPS) == [7, 7]


def test_no_room_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"kv_cache_memory has no room.*4 tokens in 8000 bytes"):
        blocks(ExecutorConfig(kv_cache_memory=7999))
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    with pytest.raises(OptionError, match="25% of the free memory has no room"):
        blocks(ExecutorConfig())


def test_the_size_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="inlay"):
        blocks(ExecutorConfig(kv_cache_memory=2**30))
    messages = [record.getMessage() for record in caplog.records]
    # (2**30 - 160 * 5000) // 3000 blocks
    assert messages == [
        "KV cache: 1430588 tokens in 357647 + 160 blocks, 1024.0 MiB (kv_cache_memory)"
    ]


def test_free_memory_is_a_sensible_number() -> None:
    assert 2**20 < memory.free_memory(CPU) < 2**50
