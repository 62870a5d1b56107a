from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlay.errors import RequestError
from inlay.runtime import stats as stats_module
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, run_all

GREEDY = SamplingParams(temperature=0, max_tokens=5)
PHASES = {"schedule", "prepare", "launch", "wait", "output"}


def test_counters_count() -> None:
    executor = Executor(FakeModel(), ExecutorConfig(max_num_tokens=8))
    executor.add_request(NewRequest("a", list(range(12)), GREEDY))
    executor.step()
    stats = executor.get_stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_steps"]) == (1, 0, 1)
    assert (stats["num_prefill_tokens"], stats["num_decode_tokens"]) == (8, 0)
    assert 0 < stats["kv_cache_usage"] < 1
    run_all(executor)
    executor.add_request(NewRequest("b", [*range(8), 50], GREEDY))
    run_all(executor)
    stats = executor.get_stats()
    assert stats["num_prompt_tokens"] == 12 + 9
    assert stats["num_cached_tokens"] == 8
    assert stats["prefix_hit_rate"] == 8 / 21
    assert stats["num_prefill_tokens"] == 12 + 1
    assert stats["num_decode_tokens"] == 4 + 4
    assert stats["num_sampled_tokens"] == 5 + 5
    assert (stats["num_finished"], stats["num_failed"], stats["num_preemptions"]) == (2, 0, 0)
    assert stats["kv_cache_usage"] == 0
    assert stats["num_cached_blocks"] > 0
    assert all(stats[f"{phase}_time"] > 0 for phase in PHASES)
    assert json.loads(json.dumps(stats)) == stats


def test_failures_and_preemptions_are_counted() -> None:
    model = FakeModel()
    executor = Executor(model, ExecutorConfig(max_num_seqs=3, kv_cache_tokens=64))
    nothing = SamplingParams(temperature=0, allowed_token_ids=[5], bad_words_ids=[[5]])
    executor.add_request(NewRequest("bad", [1], nothing))
    run_all(executor)
    assert executor.get_stats()["num_failed"] == 1
    config = ExecutorConfig(max_num_seqs=3, kv_cache_tokens=48, scheduler_policy="max_utilization")
    executor = Executor(FakeModel(), config)
    for name in "abc":
        executor.add_request(NewRequest(name, [1, 2, 3], SamplingParams(max_tokens=30)))
    run_all(executor)
    assert executor.get_stats()["num_preemptions"] > 0


def test_the_iteration_log_is_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    executor = Executor(FakeModel(), ExecutorConfig(iteration_log=str(path), max_num_tokens=8))
    executor.add_request(NewRequest("a", list(range(12)), GREEDY))
    executor.add_request(NewRequest("b", [1], GREEDY))
    run_all(executor)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    executor.shutdown()
    assert [line["step"] for line in lines] == list(range(1, 1 + len(lines)))
    assert [line["num_tokens"] for line in lines[:3]] == [8, 5, 2]
    assert [line["num_requests"] for line in lines[:3]] == [1, 2, 2]
    assert lines[0]["num_waiting"] == 1
    assert all(line["step_time"] > 0 and line["time"] > 1e9 for line in lines)
    assert lines[-1] == {"time": lines[-1]["time"], **executor.get_stats()["last_step"]}


def test_a_trace_is_chromes() -> None:
    executor = Executor(FakeModel())
    executor.add_request(NewRequest("a", [1, 2], GREEDY))
    executor.step()
    executor.start_trace()
    executor.step()
    trace = json.loads(json.dumps(executor.stop_trace()))
    events = trace["traceEvents"]
    assert {event["name"] for event in events} == {*PHASES, "step"}
    (whole,) = (event for event in events if event["name"] == "step")
    for event in events:
        assert event["ph"] == "X"
        assert {"pid", "tid", "ts", "dur", "args"} <= event.keys()
        assert event["dur"] >= 0
        # Times in microseconds of 1e6 to 1e12 keep about a nanosecond in a double.
        assert whole["ts"] <= event["ts"] + 1e-2
        assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 1e3
    assert whole["args"]["num_requests"] == 1
    executor.step()
    assert executor.stop_trace()["traceEvents"] == [], "it was stopped"


def test_a_forgotten_trace_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "MAX_TRACE_EVENTS", 7)
    executor = Executor(FakeModel())
    executor.start_trace()
    executor.add_request(NewRequest("a", [1, 2], GREEDY))
    run_all(executor)
    assert len(executor.stop_trace()["traceEvents"]) == 7


def test_one_trace_at_a_time() -> None:
    stats = stats_module.Stats()
    stats.start_trace()
    with pytest.raises(RequestError, match="recorded already"):
        stats.start_trace()
    stats.stop_trace()
    stats.start_trace()
