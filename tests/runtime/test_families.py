"""One of a request's sequences ends alone; steps fail under copies, or without their leader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from inlay.runtime.block_tables import BlockCopy
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, assert_nothing_held

THREE = SamplingParams(n=3, max_tokens=5, seed=3)
PROMPT = list(range(20))


def make_executor(**options: Any) -> Executor:
    return Executor(FakeModel(), ExecutorConfig(debug=True, **options))


def finish(executor: Executor) -> list[StepOutput]:
    outputs = []
    for _ in range(100):
        outputs += executor.step()
    assert not executor.has_unfinished
    return outputs


def tokens_of(outputs: list[StepOutput]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for output in outputs:
        found[output.index] = [*found.get(output.index, []), *output.token_ids]
    return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("index", range(3))
def test_one_sequence_ends_and_the_others_go_on(index: int, num_steps: int, overlap: bool) -> None:
    """While it waits, in the middle of the prompt, and behind the fork."""
    whole = make_executor()
    whole.add_request(NewRequest("r", PROMPT, THREE))
    expected = tokens_of(finish(whole))
    executor = make_executor(max_num_tokens=8, overlap=overlap)
    executor.add_request(NewRequest("r", PROMPT, THREE))
    outputs = [output for _ in range(num_steps) for output in executor.step()]
    assert executor.abort("r", index)
    assert not executor.abort("r", index)
    later = finish(executor)
    assert index not in {output.index for output in later}
    found = tokens_of(outputs + later)
    for other in {0, 1, 2} - {index}:
        assert found[other] == expected[other]
    assert not any(output.error for output in later)
    executor.add_request(NewRequest("r", PROMPT, THREE))
    assert executor.abort("r")
    finish(executor)
    assert_nothing_held(executor)


def test_a_beam_does_not_end_alone() -> None:
    executor = make_executor()
    params = SamplingParams(use_beam_search=True, n=3, max_tokens=5)
    executor.add_request(NewRequest("r", PROMPT, params))
    outputs = executor.step() + executor.step()
    assert not executor.abort("r", 1)
    outputs += finish(executor)
    assert [(output.index, output.finish_reason) for output in outputs] == [
        (index, "length") for index in range(3)
    ]
    assert_nothing_held(executor)


@dataclass
class Late:
    """A launcher whose calls run when their results are read."""

    def launch(self, call: Callable[[], Any]) -> Any:
        return _Call(call)

    def close(self) -> None:
        pass


@dataclass
class _Call:
    call: Callable[[], Any]

    def result(self) -> Any:
        return self.call()


def test_a_step_that_fails_without_its_leader_fails_the_others() -> None:
    """The leader was aborted while its prompt's last step was under way, which then fails."""
    model = FakeModel()
    executor = Executor(model, ExecutorConfig(debug=True, overlap=True), Late())
    executor.add_request(NewRequest("r", PROMPT[:4], THREE))
    executor.step()
    broken = RuntimeError("out of luck")

    def fail(number: int) -> None:
        if number == 1:
            raise broken

    model.before_forward = fail
    assert executor.abort("r", 0)
    outputs = finish(executor)
    assert [output.error for output in outputs] == [broken]
    assert_nothing_held(executor)


def test_copies_wait_for_a_step_that_runs() -> None:
    """A step that came to nothing, since all gave way, has not made them."""
    executor = make_executor(kv_cache_tokens=64)
    executor.kv_cache.copies.append(BlockCopy("fork", 0, 1, 2))
    executor.step()
    assert executor.kv_cache.copies == [BlockCopy("fork", 0, 1, 2)]
    executor.add_request(NewRequest("r", [1], SamplingParams(max_tokens=1)))
    executor.step()
    assert executor.kv_cache.copies == []


def test_a_failed_offload_is_not_brought_back() -> None:
    """A later step, launched before, brings back what an earlier one did not put away."""
    executor = Executor(
        FakeModel(windows=(0,)),
        ExecutorConfig(debug=True, overlap=True, kv_cache_tokens=32, host_cache_memory=16 * 4 * 8),
        Late(),
    )
    greedy = SamplingParams(temperature=0, max_tokens=1)
    base = PROMPT[:16]

    def run(name: str, prompt: list[int]) -> list[int]:
        executor.add_request(NewRequest(name, prompt, greedy))
        return tokens_of(finish(executor))[0]

    expected = run("first", [*base, 50])
    run("second", [60 + i for i in range(17)])
    # Gives up a block of base's, and fails; base's next request is launched before that is known.
    copier = executor._runner.copier
    real, broken = copier.run, RuntimeError("out of luck")
    state = {"failed": False}

    def fail_once(copies: list[BlockCopy]) -> None:
        if any(copy.kind == "offload" for copy in copies) and not state["failed"]:
            state["failed"] = True
            raise broken
        real(copies)

    copier.run = fail_once  # type: ignore[method-assign]
    executor.add_request(NewRequest("fails", [30 + i for i in range(10)], greedy))
    executor.step()
    executor.add_request(NewRequest("again", [*base, 50], greedy))
    outputs = finish(executor)
    assert state["failed"]
    assert [o.error for o in outputs if o.request_id == "fails"] == [broken]
    assert tokens_of([o for o in outputs if o.request_id == "again"])[0] == expected
    assert_nothing_held(executor)
