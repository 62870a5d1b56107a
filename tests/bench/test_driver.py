"""Schedules, and requests that are sent by one: over a model that costs nothing."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

from inlay.bench.datasets import Request
from inlay.bench.driver import Watch, arrival_times, check_rate, run_offline, run_streams
from inlay.errors import OptionError
from inlay.runtime.sampling_params import SamplingParams
from tests.fake_llm import FakeLLM, assert_idle, fail_at, slow_down

GREEDY = SamplingParams(temperature=0, ignore_eos=True)
REQUESTS = [Request([10 + i, 11, 12], 4) for i in range(6)]


def test_arrivals() -> None:
    assert arrival_times(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]
    count = 20_000
    for burstiness in (0.5, 1.0, 4.0):
        times = np.array(arrival_times(count, 8.0, burstiness, seed=1))
        gaps = np.diff(times)
        assert times[0] == 0
        # Gaps of mean 1/8 and, relative to it, deviation burstiness ** -0.5: 20,000 of them are
        # within 5 % by more than 4 standard errors.
        assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
        assert gaps.std() * 8 == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_times(5, 2.0, 1.0, 0) == arrival_times(5, 2.0, 1.0, 0)
    assert arrival_times(5, 2.0, 1.0, 0) != arrival_times(5, 2.0, 1.0, 1)


@pytest.mark.parametrize(
    ("rate", "burstiness", "most", "message"),
    [
        (-1.0, 1.0, None, "--request-rate must be above 0"),
        (0.0, 1.0, None, "--request-rate"),
        (float("nan"), 1.0, None, "--request-rate"),
        (1.0, 0.0, None, "--burstiness"),
        (1.0, float("inf"), None, "--burstiness"),
        (1.0, 1.0, 0, "--max-concurrency"),
    ],
)
def test_wrong_rates(rate: float, burstiness: float, most: int | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_rate(rate, burstiness, most)


def test_streams_and_whole_outputs() -> None:
    with FakeLLM(tokenizer=None) as llm:
        with Watch(llm) as watch:
            whole = run_offline(llm, REQUESTS, GREEDY)
        assert watch.count("num_prompt_tokens") == 18
        assert watch.facts()["prefix_hit_rate"] == 0.0
        streamed = run_streams(llm, REQUESTS, GREEDY, [0.0] * 6)
        assert_idle(llm)
    for record in (*whole, *streamed):
        assert (record.num_input, record.num_output, record.reason) == (3, 4, "length")
        assert record.completed
        assert record.ttft is not None
        assert record.e2e is not None
        assert 0 < record.ttft < record.e2e
    assert all(record.gaps is None for record in whole)
    assert len({record.due for record in whole}) == 1
    assert all(record.gaps is not None and len(record.gaps) <= 3 for record in streamed)


def test_a_schedule_is_kept_and_a_limit_too() -> None:
    running: list[int] = []
    with FakeLLM(tokenizer=None) as llm:
        slow_down(llm)
        forward = llm.model.before_forward

        def seen(number: int) -> None:
            running.append(llm._frontend.processor.num_unfinished)
            forward(number)

        llm.model.before_forward = seen
        due = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
        records = run_streams(llm, REQUESTS, GREEDY, due, max_concurrency=2)
    offsets = [record.due - records[0].due for record in records]
    assert offsets == pytest.approx(due)
    assert all(record.wait >= 0 for record in records)
    assert max(running) == 2


def test_requests_that_fail_are_told_of() -> None:
    with FakeLLM(tokenizer=None) as llm:
        wrong = [Request([1, 10**6], 4), Request([5, 6], 10**7)]
        refused, *rest = run_streams(llm, [*wrong, REQUESTS[0]], GREEDY, [0.0] * 3)
        assert (refused.reason, refused.completed, refused.num_output) == ("refused", False, 0)
        assert "1000000" in str(refused.error)
        assert rest[-1].completed
        fail_at(llm, 1, ValueError("a bug"))
        failed = run_streams(llm, REQUESTS[:2], GREEDY, [0.0, 0.0])
    assert any(not record.completed and "a bug" in str(record.error) for record in failed)


def test_an_interrupt_leaves_nothing_under_way() -> None:
    with FakeLLM(tokenizer=None) as llm:
        slow_down(llm)  # 30 steps take 0.15 s at least
        main = threading.get_ident()
        timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))  # Ctrl-C
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_streams(llm, [Request([5, 6], 30)] * 3, GREEDY, [0.0] * 3)
        llm.model.before_forward = lambda number: None
        assert all(record.completed for record in run_offline(llm, REQUESTS, GREEDY))
        assert_idle(llm)
