from __future__ import annotations

import re
from typing import Any

import pytest

from inlay.backends.base import ModelLimits
from inlay.errors import OptionError
from inlay.runtime.config import ExecutorConfig

LIMITS = ModelLimits(vocab_size=10, max_seq_len=64, max_num_tokens=32, max_num_seqs=8, block_size=4)


def test_nothing_given_is_what_the_model_was_built_for() -> None:
    assert ExecutorConfig().narrow(LIMITS) == LIMITS


def test_options_narrow_the_limits() -> None:
    config = ExecutorConfig(max_num_tokens=16, max_num_seqs=4, max_seq_len=20)
    limits = config.narrow(LIMITS)
    assert limits == ModelLimits(10, 20, 16, 4, 4)


@pytest.mark.parametrize("name", ["max_num_tokens", "max_num_seqs", "max_seq_len"])
def test_options_cannot_exceed_the_limits(name: str) -> None:
    most = getattr(LIMITS, name)
    ExecutorConfig(**{name: most}).narrow(LIMITS)
    with pytest.raises(OptionError, match=rf"{name} can be at most {most}.*given {most + 1}"):
        ExecutorConfig(**{name: most + 1}).narrow(LIMITS)


def test_every_running_request_needs_a_token_of_the_budget() -> None:
    with pytest.raises(OptionError, match=r"at least max_num_seqs.*given 7 and 8"):
        ExecutorConfig(max_num_tokens=7).narrow(LIMITS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_tokens", 1),
        ("max_num_seqs", 0),
        ("max_seq_len", 1),
        ("kv_cache_tokens", 0),
        ("kv_cache_memory", -1),
        ("kv_cache_memory", 1.5),
        ("max_num_seqs", "4"),
        ("max_num_seqs", True),
        ("eos_token_ids", 2),
        ("eos_token_ids", ["a"]),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name} must be a.*given {re.escape(repr(value))}"):
        ExecutorConfig(**{name: value})


@pytest.mark.parametrize(
    "sizes",
    [
        {"kv_cache_tokens": 100, "kv_cache_memory": 200},
        {"kv_cache_memory": 200, "kv_cache_free_fraction": 0.5},
    ],
)
def test_one_size_of_the_cache(sizes: dict[str, Any]) -> None:
    one, two = sizes
    message = f"{one} and {two} both size the KV cache.*given {sizes[one]}, {sizes[two]}"
    with pytest.raises(OptionError, match=message):
        ExecutorConfig(**sizes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler_policy", "fifo"),
        ("overlap", "yes"),
        ("cuda_graphs", 2),
        ("enable_prefix_caching", None),
        ("debug", "no"),
    ],
)
def test_choices_are_named(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"{name} must be one of .*; given {value!r}"):
        ExecutorConfig(**{name: value})


@pytest.mark.parametrize("value", [0, 1.1, -0.5, "half", True, float("nan")])
def test_a_share_of_the_memory(value: Any) -> None:
    with pytest.raises(OptionError, match=r"kv_cache_free_fraction must be in \(0, 1\]; given"):
        ExecutorConfig(kv_cache_free_fraction=value)
    assert ExecutorConfig(kv_cache_free_fraction=1).kv_cache_free_fraction == 1


@pytest.mark.parametrize("value", ["json:loads", [1], None])
def test_processors_are_a_list_of_names(value: Any) -> None:
    with pytest.raises(OptionError, match="logits_processors must be a list of"):
        ExecutorConfig(logits_processors=value)
