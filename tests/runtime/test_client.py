"""The client, its ledger and the loop, with the executor in a thread of this process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from inlay.errors import EngineError, OptionError, RequestError
from inlay.runtime import thread_link
from inlay.runtime.client import CONTROLS, ExecutorClient, connect
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.ledger import Ledger, Pending
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, generate_alone
from tests.runtime.recorder import Recorder

PROMPT = [5, 6, 7]


def new(name: str, max_tokens: int = 8, **params: Any) -> NewRequest:
    return NewRequest(name, PROMPT, SamplingParams(temperature=0, max_tokens=max_tokens, **params))


def alone(max_tokens: int = 8) -> list[int]:
    return generate_alone(FakeModel(), PROMPT, new("", max_tokens).params, 64)[0]


class Gate:
    """Holds a model's steps until it is opened."""

    def __init__(self, model: FakeModel) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        model.before_forward = self._hold

    def _hold(self, step_number: int) -> None:
        self.reached.set()
        assert self.open.wait(60)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def client(model: FakeModel, recorder: Recorder) -> Iterator[ExecutorClient]:
    client = open_client(model, recorder)
    yield client
    model.before_forward = lambda step_number: None
    client.close()


def open_client(model: Any, recorder: Recorder) -> ExecutorClient:
    return connect(
        model,
        ExecutorConfig(debug=True),
        in_process=True,
        on_outputs=recorder.on_outputs,
        on_death=recorder.on_death,
    )


def test_tokens_are_the_executors(client: ExecutorClient, recorder: Recorder) -> None:
    assert client.alive
    assert client.admission.limits.vocab_size == 97
    assert client.admission.in_process
    for name in "abc":
        client.submit(new(name))
    for name in "abc":
        assert recorder.last(name).finish_reason == "length"
        assert recorder.tokens(name) == alone()
    assert threading.current_thread() not in recorder.threads


def test_a_model_is_loaded_of_an_engine(model: FakeModel, recorder: Recorder) -> None:
    class Engine:
        loads = 0

        def load_model(self) -> FakeModel:
            self.loads += 1
            return model

    engine = Engine()
    client = open_client(engine, recorder)
    client.restart()
    client.submit(new("a"))
    recorder.last("a")
    client.close()
    assert engine.loads == 2


def test_sequences_of_a_request_end_each(client: ExecutorClient, recorder: Recorder) -> None:
    drawn = SamplingParams(n=2, best_of=3, seed=1, max_tokens=4)
    beams = SamplingParams(n=2, use_beam_search=True, max_tokens=4)
    client.submit(NewRequest("drawn", PROMPT, drawn))
    client.submit(NewRequest("beams", PROMPT, beams))
    for name, count in (("drawn", 3), ("beams", 2)):
        recorder.wait_for(lambda n=name, c=count: sum(o.finished for o in recorder.of(n)) == c)
        assert {output.index for output in recorder.of(name)} == set(range(count))
        client.submit(new(name, 1))  # the id is free again
        recorder.wait_for(lambda n=name, c=count: sum(o.finished for o in recorder.of(n)) == c + 1)


def test_a_refused_request_is_answered(client: ExecutorClient, recorder: Recorder) -> None:
    client.submit(NewRequest("bad", [97], new("").params))
    client.submit(new("good"))
    assert isinstance(recorder.last("bad").error, RequestError)
    assert recorder.last("bad").finish_reason == "error"
    assert recorder.last("good").finish_reason == "length"


def test_an_id_in_use_is_refused_at_once(
    client: ExecutorClient, recorder: Recorder, model: FakeModel
) -> None:
    gate = Gate(model)
    client.submit(new("a"))
    with pytest.raises(RequestError, match="'a' is in use"):
        client.submit(new("a"))
    gate.open.set()
    recorder.last("a")
    client.submit(new("a"))
    recorder.wait_for(lambda: len(recorder.tokens("a")) == 16)


def test_an_aborted_request_gives_nothing_more(
    client: ExecutorClient, recorder: Recorder, model: FakeModel
) -> None:
    gate = Gate(model)
    client.submit(new("a"))
    client.submit(new("b"))
    assert gate.reached.wait(60)
    client.abort("a")
    client.abort("never seen")
    gate.open.set()
    assert recorder.last("b").finish_reason == "length"
    assert not recorder.of("a")
    assert client.call("get_stats", timeout=60) is not None


def test_close_aborts_what_is_unfinished(
    client: ExecutorClient, recorder: Recorder, model: FakeModel
) -> None:
    gate = Gate(model)
    client.submit(new("a", 50))
    assert gate.reached.wait(60)
    closing = threading.Thread(target=client.close)
    closing.start()
    gate.open.set()
    closing.join()
    assert recorder.last("a").finish_reason == "abort"
    assert recorder.last("a").error is None
    assert not client.alive
    assert not recorder.deaths
    client.close()
    client.abort("a")
    for use in (lambda: client.submit(new("b")), lambda: client.call("get_stats")):
        with pytest.raises(EngineError, match=r"closed; restart\(\)"):
            use()
    client.restart()
    client.submit(new("b"))
    assert recorder.last("b").finish_reason == "length"
    assert recorder.tokens("b") == alone()


def test_a_step_that_raises_ends_its_requests_only(
    client: ExecutorClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, model: FakeModel
) -> None:
    gate, step = Gate(model), Executor.step

    def fault(self: Executor) -> list[StepOutput]:
        step(self)
        monkeypatch.setattr(Executor, "step", step)
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Executor, "step", fault)
    client.submit(new("a"))
    assert gate.reached.wait(60)
    client.submit(new("b"))
    gate.open.set()
    assert isinstance(recorder.last("a").error, ZeroDivisionError)
    assert recorder.last("b").finish_reason == "length"
    assert recorder.tokens("b") == alone()
    assert client.alive


def test_the_death_of_the_thread_is_told(
    client: ExecutorClient, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, model: FakeModel
) -> None:
    gate = Gate(model)
    client.submit(new("a", 50))
    client.submit(new("b", 50))
    assert gate.reached.wait(60)
    with monkeypatch.context() as broken:
        broken.setattr(Executor, "has_unfinished", property(lambda self: 1 // 0))
        gate.open.set()
        recorder.wait_for(lambda: bool(recorder.deaths), 1)
    for name in "ab":
        last = recorder.last(name)
        assert last.finish_reason == "error"
        assert "ZeroDivisionError" in str(last.error)
        assert "restart()" in str(last.error)
    assert not client.alive
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        client.submit(new("c"))
    assert len(recorder.deaths) == 1
    client.restart()
    client.submit(new("c"))
    recorder.last("c")
    assert recorder.tokens("c") == alone()


def test_calls(client: ExecutorClient, recorder: Recorder, model: FakeModel) -> None:
    with pytest.raises(OptionError, match=r"get_stats, .*; given 'step'"):
        client.call("step")
    with pytest.raises(TypeError):
        client.call("get_stats", "too", "many")
    for control in CONTROLS:
        args = [PROMPT] if control.endswith("pin_prefix") else []
        client.call(control, *args, timeout=60)
    gate = Gate(model)
    client.submit(new("a"))
    assert gate.reached.wait(60)
    with pytest.raises(TimeoutError, match=r"get_stats was not answered within 0\.05 seconds"):
        client.call("get_stats", timeout=0.05)
    gate.open.set()
    assert client.call("get_stats", timeout=60) is not None
    recorder.last("a")


def test_callbacks_may_submit_and_close_but_not_call(model: FakeModel) -> None:
    seen: list[object] = []
    closed = threading.Event()

    def on_outputs(outputs: list[StepOutput]) -> None:
        if outputs[0].request_id == "a":
            with pytest.raises(EngineError, match="wait for ever") as caught:
                client.call("get_stats")
            client.submit(new("b", 1))
            seen.append(caught.value)
            raise ValueError("the callback's own fault")
        seen.append(outputs[0].token_ids)
        client.close()
        closed.set()

    client = connect(model, in_process=True, on_outputs=on_outputs, on_death=seen.append)
    client.submit(new("a", 1))
    assert closed.wait(60)
    client.close()
    assert len(seen) == 2
    assert seen[1] == tuple(alone(1))


def test_a_forgotten_client_ends_its_thread(model: FakeModel) -> None:
    before = set(threading.enumerate())
    client = open_client(model, Recorder())
    (thread,) = set(threading.enumerate()) - before
    client.submit(new("a", 50))
    del client
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_a_fork_does_not_use_or_end_it(client: ExecutorClient, recorder: Recorder) -> None:
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            assert not client.alive
            for use in (
                lambda: client.submit(new("a")),
                lambda: client.abort("a"),
                lambda: client.call("get_stats"),
                client.restart,
            ):
                with pytest.raises(EngineError, match="is a fork"):
                    use()
            client.close()
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.submit(new("a"))
    assert recorder.last("a").finish_reason == "length"


def test_options_of_the_other_kind_are_refused(model: FakeModel) -> None:
    open_: Callable[..., Any] = connect
    nobody = {"on_outputs": print, "on_death": print}
    with pytest.raises(OptionError, match="FakeModel cannot be loaded by another process"):
        open_(model, in_process=False, **nobody)
    with pytest.raises(OptionError, match="num_threads is for in_process=False"):
        open_(model, in_process=True, num_threads=1, **nobody)


def test_the_interpreter_ends_in_the_middle_of_a_request() -> None:
    code = (
        "import time\n"
        "from tests.runtime.test_client import FakeModel, Recorder, new, open_client\n"
        "client = open_client(FakeModel(), recorder := Recorder())\n"
        "client.submit(new('a', 60))\n"
        "recorder.wait_for(lambda: bool(recorder.outputs))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def many(name: str, n: int, **params: Any) -> NewRequest:
    return NewRequest(name, PROMPT, SamplingParams(n=n, **params))


@pytest.mark.parametrize(("n", "best_of", "expected"), [(1, None, 1), (3, None, 3), (2, 4, 4)])
def test_a_request_waits_for_each_of_its_sequences(
    n: int, best_of: int | None, expected: int
) -> None:
    pending = Pending()
    pending.add(many("a", n, best_of=best_of))
    for index in reversed(range(expected)):
        one, last = StepOutput("a", (1,), index=index), StepOutput("a", (), "stop", index=index)
        assert pending.settle([one, StepOutput("b")]) == [one]
        assert "a" in pending
        assert pending.settle([one, last, one]) == [one, last]
        assert not pending.settle([one])
    assert "a" not in pending
    pending.add(many("a", n, best_of=best_of))
    assert pending.take_all() == {"a": list(range(expected))}


def test_an_error_ends_a_request_whichever_of_its_sequences_bears_it() -> None:
    pending = Pending()
    pending.add(many("a", 3))
    pending.drop("a", 0)
    error = StepOutput("a", finish_reason="error", error=RequestError("over"))
    assert pending.settle([StepOutput("a", (1,)), error, error]) == [error]
    assert "a" not in pending


def test_a_beam_search_ends_with_what_it_has_found() -> None:
    pending = Pending()
    for name, best_of in (("a", None), ("b", 4), ("a", None)):
        pending.add(many(name, 3, best_of=best_of, use_beam_search=True))
        outputs = [StepOutput(name, (1,), "stop", index=index) for index in (0, 1)]
        assert pending.settle(outputs) == outputs
        assert name not in pending
    pending.add(many("b", 2, best_of=3))
    assert pending.settle([StepOutput("b", finish_reason="timeout")])
    assert pending.take_all() == {"b": [1, 2]}


def test_the_end_is_told_once_for_each_that_waits() -> None:
    def ledger_with_requests() -> tuple[Ledger, Recorder]:
        recorder = Recorder()
        ledger = Ledger(recorder.on_outputs, recorder.on_death)
        ledger.add(many("a", 3))
        ledger.add(many("b", 2))
        ledger.add(many("c", 2))
        ledger.deliver([StepOutput("a", (1,), "stop", index=0)])
        ledger.deliver([StepOutput("c", error=RequestError("over")), StepOutput("c", index=1)])
        ledger.drop("b", 1)
        return ledger, recorder

    ledger, recorder = ledger_with_requests()
    _, reply = ledger.open_call()
    ledger.end(None)
    assert [(o.request_id, o.index, o.finish_reason) for o in recorder.outputs[2:]] == [
        ("a", 1, "abort"), ("a", 2, "abort"), ("b", 0, "abort"),
    ]  # fmt: skip
    assert isinstance(reply.exception(0), EngineError)
    ledger, recorder = ledger_with_requests()
    death = EngineError("dead")
    ledger.end(death)
    assert [(o.request_id, o.index, o.error) for o in recorder.outputs[2:]] == [
        ("a", 1, death), ("b", 0, death),
    ]  # fmt: skip
    assert recorder.deaths == [death]


def test_a_step_that_hangs_does_not_hold_up_close(
    model: FakeModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_link, "CLOSE_SECONDS", 0.2)
    gate, client = Gate(model), open_client(model, recorder)
    client.submit(new("a"))
    assert gate.reached.wait(30)
    begin = time.perf_counter()
    client.close()
    assert time.perf_counter() - begin < 10
    gate.open.set()
