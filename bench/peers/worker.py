"""A system of a comparison as a process: started, asked, stopped between its turns, ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVE = Path(__file__).parent / "serve.py"
LOG_LINES = 4
"""Of what a failed worker wrote last, told with the failure."""

PAUSE_TRIES = 5000
"""A millisecond apart."""

END_LIMIT_S = 10
"""From the end of its output to the end of the process."""


class WorkerError(Exception):
    """A system failed: it could not load, died, did not answer in time or answered nonsense."""


class Worker:
    """One loaded system. It runs only while it is asked: SIGSTOP holds it between its turns, so
    that its spinning threads take nothing from the others."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, load_limit_s: float
    ) -> None:
        """Start the process and wait until it is loaded.

        log: gets what it writes to stderr. start_s: seconds from the start until it was loaded.
        facts: what it says of itself. Raises WorkerError.
        """
        self.log = log
        self._pending = b""
        self._closed = False
        begin = time.perf_counter()
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
            )
        try:
            self.facts: dict[str, Any] = self._answer(load_limit_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - begin
        self.pause()

    def ask(self, command: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Its answer; raises WorkerError, behind which it is closed."""
        try:
            self._signal(signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._answer(limit_s)
        except (WorkerError, OSError) as error:
            told = str(error) if isinstance(error, WorkerError) else self._end()
            self.close()
            raise WorkerError(told) from None
        self.pause()
        return answer

    def run(self, requests: list[dict[str, Any]], limit_s: float) -> dict[str, Any]:
        """Outputs and times of these requests; raises WorkerError where tokens are missing."""
        answer = self.ask({"op": "run", "requests": requests}, limit_s)
        outputs = answer.get("outputs", [])
        lengths = [len(tokens) for tokens in outputs]
        wanted = [request["max_tokens"] for request in requests]
        if lengths != wanted:
            self.close()
            raise WorkerError(f"it gave {lengths} tokens where {wanted} were asked for")
        return answer

    def pause(self) -> None:
        """Returns when it stands still, or is gone. Asks again, since whoever else stops and
        continues processes on this machine may have continued it just now."""
        wanted = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
        for _ in range(PAUSE_TRIES):
            if self._closed or self.process.poll() is not None:
                return
            self._signal(signal.SIGSTOP)
            if os.waitid(os.P_PID, self.process.pid, wanted) is not None:
                return
            time.sleep(0.001)
        raise WorkerError("it does not stop")

    def close(self) -> None:
        if self._closed:  # its number may be another group's by now
            return
        self._closed = True
        self._signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _signal(self, number: signal.Signals) -> None:
        """To the whole group, helpers of the process included; it may be gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise WorkerError(f"no answer within {limit_s:.0f} s{self._told()}")
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise WorkerError(self._end())
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError:
            raise WorkerError(f"its answer is no JSON: {line[:80]!r}") from None

    def _end(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_LIMIT_S)
        status = self.process.returncode
        return f"it ended with status {status}{self._told()}"

    def _told(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        return "; it wrote: " + " | ".join(lines) if lines else ""
