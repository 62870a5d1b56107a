"""The compile workers, with a stand-in for the compiler: what happens when one dies or hangs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from inlay.backends.cache import fetch
from inlay.backends.inductor.workers import Job, Settings, compile_jobs
from inlay.errors import BuildError

WORKER = f"""#!{sys.executable} -S
import json, os, pathlib, signal, subprocess, sys, time
print("a line of the log", file=sys.stderr, flush=True)
for line in sys.stdin:
    job = json.loads(line)
    action = json.loads(pathlib.Path(job["graph"]).read_text())["action"]
    note = pathlib.Path(job["ops"]) / f"{{action}}-{{os.getpid()}}"
    note.touch()
    reply = {{}}
    if action == "compile":
        pathlib.Path(job["package"]).write_text(json.dumps(job["optimization_level"]))
    if action == "fail":
        reply = {{"error": "ValueError: no such thing"}}
    if action in ("die", "hang"):
        compiler = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
        (pathlib.Path(job["ops"]) / f"compiler-{{compiler.pid}}").touch()
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(1000)
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the library of ops; the workers note there what they do."""
    executable = tmp_path / "worker"
    executable.write_text(WORKER)
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr("inlay.backends.inductor.workers._num_workers", lambda num_jobs: 2)
    folder = tmp_path / "ops"
    folder.mkdir()
    return folder


def job(folder: Path, key: str, action: str) -> Job:
    return Job(key, {"action": action}, folder / "cache" / f"{key}.pt2")


def processes(ops: Path) -> list[psutil.Process]:
    """The workers and compilers that noted themselves and are still there."""
    found = []
    for path in ops.iterdir():
        pid = int(path.name.rpartition("-")[2])
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            found.append(psutil.Process(pid))
    return found


def wait_for(ops: Path, pattern: str, count: int = 1) -> None:
    deadline = time.monotonic() + 30
    while len(list(ops.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)


def assert_ended(ops: Path) -> None:
    psutil.wait_procs(processes(ops), timeout=5)
    assert not processes(ops)


def test_packages_appear_whole_and_nothing_else(ops: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(number), "compile") for number in range(5)]
    lines: list[str] = []
    compile_jobs(jobs, Settings("cpu", ops, 3), lines.append)
    names = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".pt2"]
    assert sorted(name.partition("-")[0] for name in names) == [str(n) for n in range(5)]
    for one in jobs:
        assert fetch(one.package, tmp_path / "fetched")
        assert (tmp_path / "fetched").read_text() == "3"
    assert not list((tmp_path / "cache").glob(".build-*"))
    assert sorted(line.split()[1] for line in lines) == [one.key for one in jobs]
    assert all("compiled in" in line for line in lines)
    assert_ended(ops)


def test_a_worker_that_dies_is_named_with_its_segment(ops: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "slow", "hang"), job(tmp_path, "bad", "die")]
    with pytest.raises(
        BuildError,
        match=r"process that compiled segment bad died \(status -9; .*out of memory\).*of the log",
    ):
        compile_jobs(jobs, Settings("cpu", ops, 0), print)
    assert list(ops.glob("compiler-*")), "no compiler ran: pointless"
    assert_ended(ops)
    assert not list((tmp_path / "cache").iterdir())


def test_a_segment_that_cannot_be_compiled_is_named(ops: Path, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "slow", "hang"), job(tmp_path, "bad", "fail")]
    with pytest.raises(BuildError, match=r"could not compile segment bad: ValueError: no such"):
        compile_jobs(jobs, Settings("cpu", ops, 0), print)
    assert_ended(ops)
    assert not list((tmp_path / "cache").iterdir())


def test_an_interrupt_ends_workers_and_compilers(ops: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_for(ops, "compiler-*", 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_jobs([job(tmp_path, key, "hang") for key in "abc"], Settings("cpu", ops, 0), print)
    thread.join()
    assert time.monotonic() - begin < 20
    assert_ended(ops)
    assert not list((tmp_path / "cache").iterdir())


def test_a_worker_killed_from_outside(ops: Path, tmp_path: Path) -> None:
    def kill() -> None:
        wait_for(ops, "hang-*")
        wait_for(ops, "compiler-*")
        pid = int(next(ops.glob("hang-*")).name.rpartition("-")[2])
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(BuildError, match=r"process that compiled segment a died \(status -9"):
        compile_jobs([job(tmp_path, "a", "hang")], Settings("cpu", ops, 0), print)
    thread.join()
    assert_ended(ops)


def test_a_cache_that_cannot_be_written(ops: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(BuildError, match=r"cannot compile segments in the cache .*INLAY_CACHE_DIR"):
        compile_jobs([job(tmp_path, "a", "compile")], Settings("cpu", ops, 0), print)


def test_an_interpreter_that_is_gone(
    ops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(BuildError, match=r"cannot compile segments .*nowhere"):
        compile_jobs([job(tmp_path, "a", "compile")], Settings("cpu", ops, 0), print)
    assert not list((tmp_path / "cache").iterdir())
