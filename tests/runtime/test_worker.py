"""The executor in a process of its own: what crosses, and what is left when somebody dies."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from inlay import Engine, compile_model
from inlay.errors import ArtifactError, EngineError, OptionError, RequestError
from inlay.runtime.client import ExecutorClient, connect
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.recorder import Recorder
from tests.runtime.worker_tools import (
    CONFIG,
    LONG,
    PROMPT,
    SCRIPT,
    SHORT,
    assert_gone_within,
    is_gone,
    workers_of,
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile_model("demo", backend="eager")


@pytest.fixture(scope="module")
def expected(engine: Engine) -> Recorder:
    """What the executor gives in this process: short, drawn, long."""
    recorder = Recorder()
    client = open_client(engine, recorder, in_process=True)
    client.submit(NewRequest("short", PROMPT, SHORT))
    client.submit(NewRequest("drawn", PROMPT[::-1], drawn_params()))
    for name in ("short", "drawn"):
        recorder.last(name)
    client.close()
    return recorder


def drawn_params() -> SamplingParams:
    return SamplingParams(
        temperature=1.5, top_k=50, seed=2**64 - 1, max_tokens=24, logprobs=3, ignore_eos=True,
        logit_bias={3: -2.5}, bad_words_ids=[[4, 5]],
    )  # fmt: skip


def open_client(engine: Any, recorder: Recorder, **options: Any) -> ExecutorClient:
    callbacks = {"on_outputs": recorder.on_outputs, "on_death": recorder.on_death}
    return connect(engine, CONFIG, **callbacks, **{"in_process": False, **options})


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def shared(engine: Engine) -> Iterator[tuple[ExecutorClient, Recorder]]:
    """One worker for the tests that do not harm it."""
    recorder = Recorder()
    client = open_client(engine, recorder, num_threads=1)
    (worker,) = workers_of(os.getpid())
    yield client, recorder
    client.close()
    assert not recorder.deaths
    assert is_gone(worker)


def test_tokens_and_logprobs_equal_those_in_process(
    shared: tuple[ExecutorClient, Recorder], expected: Recorder
) -> None:
    client, recorder = shared
    assert not client.admission.in_process
    assert client.admission.limits.vocab_size == 4096
    for turn in range(3):
        client.submit(NewRequest(f"short {turn}", PROMPT, SHORT))
        client.submit(NewRequest(f"drawn {turn}", PROMPT[::-1], drawn_params()))
    for turn in range(3):
        for name in ("short", "drawn"):
            assert recorder.last(f"{name} {turn}").error is None
            assert recorder.tokens(f"{name} {turn}") == expected.tokens(name)
        # Rows of a batch of another size: float32's last digits.
        places = zip(recorder.of(f"drawn {turn}"), expected.of("drawn"), strict=True)
        for ours, theirs in places:
            for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert list(one) == list(other)
                values = [(a.logprob, b.logprob) for a, b in zip(one.values(), other.values())]  # noqa: B905
                assert all(abs(a - b) < 1e-4 for a, b in values)


def test_faults_of_requests_are_theirs_alone(shared: tuple[ExecutorClient, Recorder]) -> None:
    client, recorder = shared
    client.submit(NewRequest("outside", [4096], SHORT))
    error = recorder.last("outside").error
    assert isinstance(error, RequestError)
    assert "4096" in str(error)
    with pytest.raises(RequestError, match="in_process=True"):
        client.submit(NewRequest("code", [len], SHORT))  # type: ignore[list-item]
    with pytest.raises(EngineError, match="TypeError"):
        client.call("get_stats", 1, 2, 3)
    assert isinstance(client.call("get_stats", timeout=60), dict)


def test_a_logits_processor_is_found_on_the_clients_path(
    shared: tuple[ExecutorClient, Recorder], expected: Recorder
) -> None:
    client, recorder = shared
    for name, token in (("only 7", 7), ("poison", 4096)):
        entry = f'tests.runtime.worker_tools:OnlyToken:{{"token": {token}}}'
        params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[entry])
        client.submit(NewRequest(name, PROMPT, params))
    client.submit(NewRequest("beside", PROMPT, SHORT))
    assert recorder.last("only 7").error is None
    assert recorder.tokens("only 7") == [7, 7, 7]
    assert "IndexError" in str(recorder.last("poison").error)
    recorder.last("beside")
    assert recorder.tokens("beside") == expected.tokens("short")


def test_submit_does_not_wait_for_a_busy_worker(shared: tuple[ExecutorClient, Recorder]) -> None:
    client, recorder = shared
    (worker,) = workers_of(os.getpid())
    # Together 4 MB, of which a socket holds a quarter of one.
    too_long = [1] * 20_000
    worker.suspend()
    try:
        start = time.perf_counter()
        for number in range(200):
            client.submit(NewRequest(f"slow {number}", PROMPT, replace(SHORT, max_tokens=1)))
            client.submit(NewRequest(f"long {number}", too_long, SHORT))
        seconds = time.perf_counter() - start
        assert client.alive
        assert not recorder.of("slow 0")
    finally:
        worker.resume()
    for number in range(200):
        assert recorder.last(f"slow {number}").finish_reason == "length"
        assert recorder.last(f"long {number}").finish_reason == "error"
    assert seconds < 10  # 0.1 s here; a full socket would make it wait for ever


def test_ctrl_c_and_stdin_are_not_the_workers(shared: tuple[ExecutorClient, Recorder]) -> None:
    client, _ = shared
    (worker,) = workers_of(os.getpid())
    worker.send_signal(signal.SIGINT)
    assert client.call("get_stats", timeout=60) is not None
    if sys.platform == "linux":
        assert os.readlink(f"/proc/{worker.pid}/fd/0") == os.devnull
        files = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in (1, 2)]
        assert files[0] == files[1]
        assert worker.environ()["OMP_NUM_THREADS"] == "1"


def test_kill_9_is_noticed_and_a_restart_is_right(
    engine: Engine, expected: Recorder, recorder: Recorder
) -> None:
    before = workers_of(os.getpid())
    client = open_client(engine, recorder)
    (worker,) = set(workers_of(os.getpid())) - set(before)
    for name in ("a", "b"):
        client.submit(NewRequest(name, PROMPT, LONG))
    client.submit(NewRequest("answered", PROMPT, SHORT))
    recorder.last("answered")
    failures: list[BaseException] = []

    def wait_for_a_call() -> None:
        try:
            while True:
                client.call("get_stats")
        except BaseException as error:
            failures.append(error)

    caller = threading.Thread(target=wait_for_a_call)
    caller.start()
    worker.kill()
    recorder.wait_for(lambda: bool(recorder.deaths), 1)
    assert not client.alive
    for name in ("a", "b"):
        last = recorder.last(name)
        assert last.finish_reason == "error"
        assert "killed by signal 9 (SIGKILL)" in str(last.error)
        assert "restart()" in str(last.error)
    assert recorder.last("answered").finish_reason == "length"
    caller.join(1)
    assert [type(failure) for failure in failures] == [EngineError]
    assert "SIGKILL" in str(failures[0])
    with pytest.raises(EngineError, match="SIGKILL"):
        client.submit(NewRequest("late", PROMPT, SHORT))
    assert len(recorder.deaths) == 1
    client.restart()
    client.submit(NewRequest("after", PROMPT, SHORT))
    recorder.last("after")
    assert recorder.tokens("after") == expected.tokens("short")
    client.close()
    assert workers_of(os.getpid()) == before


def test_an_error_of_loading_is_raised_as_itself(
    engine: Engine, recorder: Recorder, tmp_path: Path
) -> None:
    damaged = engine.save(tmp_path / "damaged")
    (damaged.path / "program.json").write_text("{}")
    before = workers_of(os.getpid())
    with pytest.raises(ArtifactError, match=r"program\.json"):
        open_client(damaged, recorder)
    with pytest.raises(OptionError, match="num_threads must be"):
        open_client(engine, recorder, num_threads=0)
    assert workers_of(os.getpid()) == before
    assert not recorder.deaths


def run_script(engine: Engine, code: str, tmp_path: Path, **options: Any) -> subprocess.Popen[str]:
    """A user's script; it has no `if __name__ == "__main__"`."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT + code)
    return subprocess.Popen(
        [sys.executable, file, engine.path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_exit_without_close_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    code = """
print("once")
client = start()
generate(client)
print(workers_of(os.getpid())[0].pid)
"""
    script = run_script(engine, code, tmp_path)
    output, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    once, pid = output.split()
    assert once == "once"
    assert not psutil.pid_exists(int(pid))


def test_a_killed_client_takes_its_worker_along(engine: Engine, tmp_path: Path) -> None:
    code = "client = start(); generate(client); print('running', flush=True); time.sleep(60)"
    script = run_script(engine, code, tmp_path)
    assert script.stdout is not None
    assert script.stdout.readline() == "running\n"
    (worker,) = workers_of(script.pid)
    script.kill()
    assert_gone_within(worker, 1)
    script.communicate()


def hand_signal(script: subprocess.Popen[str], number: int) -> None:
    """As a terminal does: to all processes of the group."""
    os.killpg(script.pid, number)


@pytest.mark.slow
def test_ctrl_c_in_a_generation_leaves_the_engine_usable(
    engine: Engine, expected: Recorder, tmp_path: Path
) -> None:
    code = """
client = start()
generate(client)
try:
    print("running", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    client.abort("long")
    client.submit(NewRequest("short", PROMPT, SHORT))
    seen.last("short")
    print(seen.tokens("short"))
    client.close()
    print(workers_of(os.getpid()))
"""
    script = run_script(engine, code, tmp_path, start_new_session=True)
    assert script.stdout is not None
    assert script.stdout.readline() == "running\n"
    hand_signal(script, signal.SIGINT)
    output, errors = script.communicate(timeout=60)
    assert (script.returncode, errors) == (0, "")
    assert output == f"{expected.tokens('short')}\n[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_client_that_ends_while_it_loads(
    engine: Engine, tmp_path: Path, number: signal.Signals, delay: float
) -> None:
    code = """
def announce():
    while not (found := workers_of(os.getpid())):
        pass
    print(found[0].pid, flush=True)

threading.Thread(target=announce, daemon=True).start()
start()
time.sleep(60)
"""
    script = run_script(engine, code, tmp_path, start_new_session=True)
    assert script.stdout is not None
    worker = psutil.Process(int(script.stdout.readline()))
    time.sleep(delay)
    if number == signal.SIGINT:
        hand_signal(script, number)
    else:
        script.send_signal(number)
    _, errors = script.communicate(timeout=10)
    assert script.returncode == -number
    if number == signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1
    assert_gone_within(worker, 2)  # it may hold the interpreter's lock while it imports torch


@pytest.mark.slow
def test_sigterm_and_a_worker_that_does_not_answer(engine: Engine, recorder: Recorder) -> None:
    client = open_client(engine, recorder)
    (worker,) = workers_of(os.getpid())
    client.submit(NewRequest("a", PROMPT, LONG))
    recorder.wait_for(lambda: bool(recorder.outputs))
    worker.terminate()
    assert "signal 15 (SIGTERM)" in str(recorder.last("a", 1).error)
    client.restart()
    (worker,) = workers_of(os.getpid())
    client.submit(NewRequest("b", PROMPT, LONG))
    recorder.wait_for(lambda: bool(recorder.of("b")))
    worker.suspend()  # neither a stop nor SIGTERM reaches it
    start = time.perf_counter()
    client.close()
    assert time.perf_counter() - start < 6
    assert recorder.last("b").finish_reason == "abort"
    assert len(recorder.deaths) == 1
    assert is_gone(worker)


@pytest.mark.slow
def test_close_while_it_loads(engine: Engine, recorder: Recorder) -> None:
    client = open_client(engine, recorder)
    client.close()
    raised: list[BaseException] = []

    def restart() -> None:
        try:
            client.restart()
        except BaseException as error:
            raised.append(error)

    for delay in (0.0, 0.05, 0.5):
        thread = threading.Thread(target=restart)
        thread.start()
        while not (workers := workers_of(os.getpid())):
            assert thread.is_alive()
        with pytest.raises(EngineError, match=r"restarting|closed"):
            client.submit(NewRequest("early", PROMPT, SHORT))
        time.sleep(delay)
        client.close()
        thread.join(5)
        assert isinstance(raised.pop(), EngineError)
        assert is_gone(workers[0])
    assert not client.alive
    assert not recorder.deaths
    client.restart()
    assert client.alive
    client.close()


@pytest.mark.slow
def test_a_fork_neither_ends_nor_keeps_the_worker(engine: Engine, tmp_path: Path) -> None:
    code = """
client = start()
if os.fork() == 0:
    sys.exit()  # with all of its atexit handlers
os.wait()
generate(client)
holder = os.fork()
if holder == 0:
    os.close(1)
    os.close(2)
    time.sleep(20)
    os._exit(0)
print(holder, flush=True)
time.sleep(60)
"""
    script = run_script(engine, code, tmp_path)
    assert script.stdout is not None
    holder = psutil.Process(int(script.stdout.readline()))
    (worker,) = workers_of(script.pid)
    script.kill()
    assert_gone_within(worker, 1)
    assert not is_gone(holder)
    holder.kill()
    script.communicate()


@pytest.mark.slow
def test_nothing_piles_up_over_restarts_and_forgotten_clients(engine: Engine) -> None:
    def held() -> tuple[int, int]:
        return psutil.Process().num_fds(), threading.active_count()

    client = open_client(engine, Recorder())
    client.close()
    before = held()
    for _ in range(2):
        client.restart()
    client.close()
    assert held() == before
    client = open_client(engine, Recorder())
    (worker,) = workers_of(os.getpid())
    client.submit(NewRequest("a", PROMPT, LONG))
    del client
    gc.collect()
    assert is_gone(worker)
    assert held() == before
