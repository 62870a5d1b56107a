"""One system of a comparison, in its own Python: it prepares a model, or loads one and answers.

    python serve.py PEER prepare CHECKPOINT DIRECTORY JOB
    python serve.py PEER serve DIRECTORY JOB

JOB is a JSON object: precision, threads, and what else the peer takes. `PEER_peer.py` gives
`versions()`, `prepare(checkpoint, directory, job)` and `Model(directory, job)` with `conditions`
and `run(requests, answers)`. Serving, the first line out says that the model is loaded; then each
line in is a command, each line out its answer, both JSON:

    {"op": "info"}
    {"op": "run", "requests": [{"prompt_token_ids": [...], "max_tokens": n}, ...]}

A run is greedy, ignores end tokens and gets all requests at once; times are seconds from its
start, taken where the peer hands out tokens. No part of inlay is imported here.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
BEGIN = time.perf_counter()


class Answers:
    """The tokens of a run as they come; what is beyond a request's max_tokens is not kept."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self.room = [request["max_tokens"] for request in requests]
        self.outputs: list[list[int]] = [[] for _ in requests]
        self.first: list[float | None] = [None for _ in requests]
        self.end: list[float | None] = [None for _ in requests]
        self.begin = time.perf_counter()

    def add(self, index: int, tokens: list[int]) -> None:
        tokens = tokens[: self.room[index] - len(self.outputs[index])]
        if tokens:
            now = time.perf_counter() - self.begin
            self.outputs[index].extend(tokens)
            self.end[index] = now
            if self.first[index] is None:
                self.first[index] = now

    def put(self, index: int, tokens: list[int], first: float, end: float) -> None:
        """A whole output, with times of time.perf_counter()."""
        self.outputs[index] = tokens
        self.first[index], self.end[index] = first - self.begin, end - self.begin

    def is_done(self, index: int) -> bool:
        return len(self.outputs[index]) == self.room[index]

    def as_dict(self) -> dict[str, Any]:
        total = time.perf_counter() - self.begin
        return {
            "outputs": self.outputs,
            "first_token_s": self.first,
            "end_s": self.end,
            "total_s": total,
        }


def peak_rss_mb() -> float:
    """Peak resident memory of this process group, summed; pages they share count for each."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == os.getpgrp():
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                total += int(lines.get("VmHWM", "0 kB").split()[0])
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return round(total / 1024, 1)


def settle(threads: int) -> None:
    """End with whoever started this, stopped or not; use no more cores than threads, whatever a
    library makes of the machine."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])


def answer(model: Any, command: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    if command["op"] == "info":
        return {**facts, "peak_rss_mb": peak_rss_mb()}
    requests = command["requests"]
    answers = Answers(requests)
    model.run(requests, answers)
    return answers.as_dict()


def main() -> None:
    # Libraries print to stdout as they like; the protocol keeps the real one.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, verb, *places, text = sys.argv[1:]
    job = json.loads(text)
    settle(job["threads"])
    peer = importlib.import_module(f"{name}_peer")
    if verb == "prepare":
        checkpoint, directory = places
        peer.prepare(Path(checkpoint), Path(directory), job)
        return
    model = peer.Model(Path(places[0]), job)
    load_s = time.perf_counter() - BEGIN
    facts = {"versions": peer.versions(), "conditions": model.conditions, "load_s": load_s}
    print(json.dumps(facts), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, json.loads(line), facts)), file=replies, flush=True)
    # Some runtimes hang or crash as they are torn down; nothing of theirs is needed any more.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
