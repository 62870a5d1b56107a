"""The runs of a comparison: all systems of a precision loaded, their runs interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from inlay.bench.peers.check import Reference, Score
from inlay.bench.peers.systems import System, Workplace
from inlay.bench.peers.worker import Worker, WorkerError
from inlay.bench.peers.workloads import Workload
from inlay.bench.roofline import read_bandwidth

Progress = Callable[[str], None]
SHORT = [{"prompt_token_ids": list(range(1, 17)), "max_tokens": 1}]
"""What a system is asked first, to know that it is ready."""


@dataclass
class Record:
    """What was seen of a system. Times in seconds, figures by workload, one for each repeat.

    prepare_s: conversion or compilation. cold_start_s, warm_start_s: from the start of its process
    to its first token, the first time with empty caches. error: why it dropped out.
    """

    system: System
    prepare_s: float | None = None
    cold_start_s: float | None = None
    warm_start_s: list[float] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    outputs: dict[str, list[list[list[int]]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    score: Score | None = None
    error: str | None = None

    @property
    def counts(self) -> bool:
        """Whether its figures may be compared: nothing failed, and its tokens are the model's."""
        right = self.score is not None and self.score.is_right(self.system.precision)
        return self.error is None and right


@dataclass
class Session:
    """The systems of one precision. limit_s: of one answer, loading included.
    bandwidth: bytes/s of the memory, read between the repeats."""

    place: Workplace
    records: list[Record]
    limit_s: float
    progress: Progress
    bandwidth: list[float] = field(default_factory=list)

    def each(self, begin: int = 0) -> list[Record]:
        """Those that have not failed; each repeat begins with another one."""
        left = [record for record in self.records if record.error is None]
        shift = begin % len(left) if left else 0
        return left[shift:] + left[:shift]

    def attempt(self, record: Record, what: str, action: Callable[..., None], *given: Any) -> None:
        """Call action(session, record, *given); a system that fails drops out, and says why."""
        self.progress(f"{record.system.precision}: {record.system.name}: {what}")
        try:
            action(self, record, *given)
        except WorkerError as error:
            record.error = f"{what}: {error}"
            self.progress(f"{record.system.name} failed: {record.error}")

    def start(self, record: Record) -> Worker:
        system, place = record.system, self.place
        worker = Worker(
            place.command(system),
            place.environment(system),
            place.log(system, "serve"),
            self.limit_s,
        )
        record.facts |= worker.facts
        return worker


def measure_start(session: Session, repeats: int) -> None:
    """Cold: empty caches, preparation and the first start. Warm: the same start again."""
    for record in session.each():
        session.attempt(record, "cold start", _cold)
    for repeat in range(repeats):
        for record in session.each(repeat):
            session.attempt(record, "warm start", _warm)


def _cold(session: Session, record: Record) -> None:
    record.prepare_s = session.place.prepare(record.system, anew=True)
    record.cold_start_s = _first_token(session, record)


def _warm(session: Session, record: Record) -> None:
    record.warm_start_s.append(_first_token(session, record))


def _first_token(session: Session, record: Record) -> float:
    worker = session.start(record)
    try:
        return worker.start_s + worker.run(SHORT, session.limit_s)["total_s"]
    finally:
        worker.close()


def measure_runs(session: Session, workloads: Sequence[Workload], repeats: int) -> None:
    """All systems stay loaded; those that wait are stopped. Every repeat reads the memory, then
    runs each workload on each system in turn."""
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for record in session.each():
            session.attempt(record, "load", _load, workers, stack)
        for workload in workloads:
            for record in session.each():
                session.attempt(record, f"{workload.name}: warm-up", _warm_up, workers, workload)
        for repeat in range(repeats):
            session.bandwidth.append(read_bandwidth())
            for workload in workloads:
                what = f"{workload.name}: {repeat + 1} of {repeats}"
                for record in session.each(repeat):
                    session.attempt(record, what, _run, workers, workload)
        for record in session.each():
            session.attempt(record, "memory", _ask_info, workers)


Workers = dict[str, Worker]


def _load(session: Session, record: Record, workers: Workers, stack: ExitStack) -> None:
    record.prepare_s = session.place.prepare(record.system)
    worker = session.start(record)
    stack.callback(worker.close)
    workers[record.system.name] = worker


def _warm_up(session: Session, record: Record, workers: Workers, workload: Workload) -> None:
    workers[record.system.name].run(list(workload.warm_up), session.limit_s)


def _run(session: Session, record: Record, workers: Workers, workload: Workload) -> None:
    own = workers[record.system.name]
    for worker in workers.values():
        if worker is not own:
            worker.pause()  # it is, unless someone continued it
    answer = own.run(list(workload.requests), session.limit_s)
    record.figures.setdefault(workload.name, []).append(workload.figure(workload, answer))
    record.outputs.setdefault(workload.name, []).append(answer["outputs"])


def _ask_info(session: Session, record: Record, workers: Workers) -> None:
    record.facts |= workers[record.system.name].ask({"op": "info"}, session.limit_s)


def check_outputs(session: Session, workloads: Sequence[Workload], num_requests: int) -> None:
    """Score the tokens of the first and the last repeat, of so many requests of each workload."""
    reference = Reference(session.place.checkpoint)
    for record in session.each():
        pairs = []
        for workload in workloads:
            runs = record.outputs[workload.name]
            for outputs in (runs[0], runs[-1]):
                some = list(zip(workload.requests, outputs, strict=True))[:num_requests]
                pairs += [(request["prompt_token_ids"], tokens) for request, tokens in some]
        session.progress(f"{record.system.precision}: {record.system.name}: outputs")
        record.score = reference.score(pairs)
