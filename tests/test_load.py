"""The traffic of `inlay.bench.load`, for seconds instead of minutes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from inlay import LLM
from inlay.bench.load import KINDS, problems, run

RIGHT: dict[str, Any] = {
    "ended": {"aborted: abort": 2, "aborted: stop": 1, "abandoned: forgotten": 1},
    "asked": {"aborted": 3, "abandoned": 1},
    "num_asked": 4,
    "num_finished": {"abort": 3, "stop": 1},
    "num_unfinished": 0,
    "num_running": 0,
    "num_waiting": 0,
    "kv_cache_usage": 0.0,
    "rss_growth": {"parent": 0.01, "worker": -0.01},
}
"""Facts of a run without problems."""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ended": {**RIGHT["ended"], "aborted: stop": 0}}, "asked"),
        ({"ended": {**RIGHT["ended"], "aborted: abort": 3}}, "asked"),
        ({"ended": {**RIGHT["ended"], "abandoned: lost": 0}}, "'abandoned' ended with 'lost'"),
        ({"num_finished": {"abort": 3}}, "4 requests, finished"),
        ({"num_finished": {"abort": 3, "stop": 2}}, "4 requests, finished"),
        ({"num_waiting": 1}, "num_waiting is 1"),
        ({"kv_cache_usage": 0.1}, "kv_cache_usage is 0.1"),
        ({"rss_growth": {"parent": 0.03, "worker": 0.0}}, "parent grew by 3.0%"),
    ],
)
def test_what_is_wrong_is_found(change: dict[str, Any], text: str) -> None:
    assert problems(RIGHT, most_growth=0.02) == []
    (found,) = problems({**RIGHT, **change}, most_growth=0.02)
    assert text in found


@pytest.mark.slow
def test_no_request_is_lost() -> None:
    with LLM(
        "demo", backend="eager", max_num_seqs=16, max_seq_len=1024, kv_cache_tokens=4096,
        scheduler_policy="max_utilization", num_threads=1, debug=True,
    ) as llm:  # fmt: skip
        facts = run(llm, 10.0, 40, 16)
    # So short a run is all warm-up: what memory does is nothing to go by.
    assert problems(facts, most_growth=math.inf) == []
    assert len(facts["asked"]) > len(KINDS) / 2, "the traffic was not mixed"
