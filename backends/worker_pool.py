"""Jobs for processes of our own: each takes a JSON object a line and answers with one.

Needs no torch, so that a worker which needs none stays small.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from inlay.backends.python_process import module_command
from inlay.errors import BuildError

LAST_WORDS = 2.0
"""Seconds that a dying process has to end."""

J = TypeVar("J")


class Worker:
    """A process, in a process group of its own with those that it starts."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """module: a program that calls `serve`."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the worker)
        self._process = subprocess.Popen(
            module_command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=None if env is None else {**os.environ, **env},
            text=True,
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, Any], doing: str, hint: str = "") -> dict[str, Any]:
        """What the process answers; doing and hint are for the error.

        Raises BuildError where the process dies or says something else. An answer may be
        {"error": ...}.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line.endswith("\n"):
            try:
                return json.loads(line)
            except ValueError as error:
                self.kill()
                raise BuildError(
                    f"the process that {doing} gave {line.strip()!r} for an answer"
                ) from error
        self._await_end()
        self.kill()
        raise BuildError(
            f"the process that {doing} died (status {self._process.returncode}; -9 often means out "
            f"of memory{hint}); its last lines: {self._last_lines()}"
        )

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-5:])

    def _await_end(self) -> None:
        """So that the status is its own. It is not reaped: until then its group's id is its own."""
        flags, deadline = os.WEXITED | os.WNOHANG | os.WNOWAIT, time.monotonic() + LAST_WORDS
        while not os.waitid(os.P_PID, self._process.pid, flags) and time.monotonic() < deadline:
            time.sleep(0.01)

    def kill(self) -> None:
        """End the process and what it started, and wait for it; again does nothing."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


W = TypeVar("W", bound=Worker)


def run_jobs(
    jobs: Sequence[J], num_workers: int, start: Callable[[int], W], do: Callable[[W, J], None]
) -> None:
    """Do all jobs, the first ones first, with workers that `start(index)` gives.

    What `do` raises ends it; on any error, an interrupt included, the workers are killed.
    """
    todo: queue.SimpleQueue[J] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)

    def drain(worker: W) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                do(worker, todo.get_nowait())

    workers: list[W] = []
    threads = ThreadPoolExecutor(num_workers)
    try:
        for index in range(num_workers):
            workers.append(start(index))
        drains = [threads.submit(drain, worker) for worker in workers]
        for one in wait(drains, return_when=FIRST_EXCEPTION).done:
            one.result()
    finally:
        for worker in workers:
            worker.kill()  # which wakes the threads that wait for an answer
        threads.shutdown()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A worker's own side: what it raises becomes {"error": ...}. Never returns."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print is no answer
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    while True:
        request = json.loads(lines.get())
        try:
            reply = answer(request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def _read(lines: queue.SimpleQueue[str]) -> None:
    """Input ends when the builder was killed: end at once, with the compilers that are running."""
    for line in sys.stdin:
        lines.put(line)
    os.killpg(0, signal.SIGKILL)
