"""What an LLM does with its engine, here and in a process of its own."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.errors import EngineError, OptionError, RequestError
from tests.fake_llm import GREEDY, FakeLLM
from tests.toys import build_toy

PROMPTS = [[5, 9, 17, 33], [8, 7, 6]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile_model(build_toy("llama"), "eager", dtype="float32", block_size=16)


@pytest.fixture(scope="module")
def llm(engine: Engine) -> Iterator[LLM]:
    with LLM(engine, kv_cache_tokens=512) as llm:
        yield llm
    assert not workers()


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.is_running()]


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_a_process_of_its_own_gives_the_same(llm: LLM, engine: Engine) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=5, logprobs=1, prompt_logprobs=0)
    with LLM(engine, in_process=True, kv_cache_tokens=512) as other:
        assert tokens(llm) == tokens(other)
        ours, theirs = (each.generate(PROMPTS, params, use_tqdm=False) for each in (llm, other))
        for one, two in zip(ours, theirs, strict=True):
            assert [c.token_ids for c in one.outputs] == [c.token_ids for c in two.outputs]
        # Requests may meet in other steps, and eager's float32 sums depend on those: 2e-6 was seen.
        pairs = [each.score(PROMPTS)[0].logprobs[1:] for each in (llm, other)]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-4)
        pairs = [each.embed(PROMPTS)[0].outputs.embedding for each in (llm, other)]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-4)
    assert llm.get_stats()["num_running"] == 0


def test_a_killed_worker_raises_and_restarts(llm: LLM) -> None:
    expected = tokens(llm)
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            long = SamplingParams(temperature=0, max_tokens=None)
            llm.generate(PROMPTS * 50, long, use_tqdm=False)
        except EngineError as error:
            failures.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    while not llm.get_stats()["num_running"]:
        time.sleep(0.01)
    (worker,) = workers()
    worker.send_signal(signal.SIGKILL)
    thread.join(timeout=5)
    assert len(failures) == 1
    with pytest.raises(EngineError, match=r"restart\(\)"):
        llm.generate(PROMPTS, GREEDY)
    assert llm._frontend.processor.num_unfinished == 0
    llm.restart()
    assert tokens(llm) == expected


def test_prefixes_are_pinned_and_forgotten() -> None:
    with FakeLLM(kv_events=True) as llm:
        prompt = list(range(1, 23))
        assert llm.pin_prefix(prompt) == 0, "nothing is cached yet"
        llm.generate([prompt], GREEDY, use_tqdm=False)
        events = llm.get_kv_events()
        assert events
        assert llm.get_kv_events() == []
        pinned = llm.pin_prefix(prompt)
        assert pinned == 20, "whole blocks of 4"
        assert llm.pin_prefix(prompt, cache_salt="other") == 0
        assert llm.unpin_prefix(prompt) == pinned
        again = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
        assert again.num_cached_tokens == 20
        assert llm.reset_prefix_cache()
        assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_a_trace_is_written(tmp_path: Path) -> None:
    with FakeLLM() as llm:
        with llm.trace(tmp_path / "trace.json"):
            llm.generate("a fox", GREEDY, use_tqdm=False)
        trace = json.loads((tmp_path / "trace.json").read_text())
        assert len([event for event in trace["traceEvents"] if event["name"] == "step"]) == 10
        with (
            pytest.raises(OptionError, match=r"path .* cannot be written"),
            llm.trace(tmp_path / "no" / "where"),
        ):
            llm.generate("a fox", GREEDY, use_tqdm=False)
        for wrong in (tmp_path, None):
            with (
                pytest.raises(OptionError, match=r"path .* cannot be written"),
                llm.trace(wrong),  # type: ignore[arg-type]
            ):
                raise AssertionError("it was run")
        with pytest.raises(ValueError, match="mine"), llm.trace(tmp_path / "other.json"):
            raise ValueError("mine")
        assert (tmp_path / "other.json").exists(), "what was traced till then is kept"


@pytest.mark.parametrize("wrong", [5, [5], None, ["0", None]])
def test_ids_of_a_wrong_type_are_refused(llm: LLM, wrong: Any) -> None:
    expected = tokens(llm)
    with pytest.raises(RequestError, match="request_id must be a text"):
        llm.abort(wrong)
    assert tokens(llm) == expected, "the engine goes on"


def test_pins_are_checked(llm: LLM) -> None:
    with pytest.raises(RequestError, match="token ids must be integers"):
        llm.pin_prefix([1, 10**30])
    with pytest.raises(RequestError, match="token ids must be integers"):
        llm.unpin_prefix(["a", "b"])
    with pytest.raises(RequestError, match="cache_salt must be None or a string"):
        llm.pin_prefix([1, 2], cache_salt=5)  # type: ignore[arg-type]


def test_statistics() -> None:
    with FakeLLM() as llm:
        llm.generate(["a fox", "x"], GREEDY, use_tqdm=False)
        stats = llm.get_stats()
        assert stats["num_finished"] == 2
        assert stats["api"] == {"num_unfinished": 0, "num_finished": {"length": 2}}
        json.dumps(stats)
