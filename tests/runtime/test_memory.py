from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from inlay.backends.base import KVGroup, ModelLimits
from inlay.errors import OptionError
from inlay.runtime import memory
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.memory import num_kv_blocks

CPU = torch.device("cpu")
LIMITS = ModelLimits(vocab_size=10, max_seq_len=30, max_num_tokens=32, max_num_seqs=8, block_size=4)
GROUPS = (KVGroup(0, 2, 3000), KVGroup(16, 4, 5000))


def blocks(config: ExecutorConfig) -> int:
    return num_kv_blocks(config, LIMITS, GROUPS, CPU)


def test_default_is_room_for_all_requests() -> None:
    """8 requests of 30 tokens are 8 blocks each: the machine running this has 2 MB to spare."""
    assert blocks(ExecutorConfig()) == 64


def test_default_takes_a_quarter_of_the_free_memory_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * (10 * 8000 + 7999))
    assert blocks(ExecutorConfig()) == 10


def test_sizes_in_tokens_and_bytes() -> None:
    assert blocks(ExecutorConfig(kv_cache_tokens=1)) == 1
    assert blocks(ExecutorConfig(kv_cache_tokens=401)) == 101
    assert blocks(ExecutorConfig(kv_cache_memory=8000)) == 1
    assert blocks(ExecutorConfig(kv_cache_memory=8000 * 1000 - 1)) == 999


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
    assert messages == ["KV cache: 536868 tokens in 134217 blocks, 1024.0 MiB (kv_cache_memory)"]


def test_free_memory_is_a_sensible_number() -> None:
    assert 2**20 < memory.free_memory(CPU) < 2**50


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_the_memory(version: int, tmp_path: Path) -> None:
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    limit, usage, cached = names[version]
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 600\n{cached} 100\n")
    assert memory._free_in_control_group(tmp_path) == 400
    if version == 2:
        (folder / limit).write_text("max\n")
        assert memory._free_in_control_group(tmp_path) > 2**50


def test_no_control_group_is_no_limit(tmp_path: Path) -> None:
    assert memory._free_in_control_group(tmp_path) > 2**50
