"""`inlay verify --backends`: the same requests through several backends, one row each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inlay.backends.base import BACKEND_OPTIONS
from inlay.engine import Engine
from inlay.errors import InlayError, OptionError
from inlay.lowering.loading import Source
from inlay.lowering.options import CompileOptions
from inlay.verify.report import Report, verify_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One backend's report; None where it could not be run: error then says why."""

    backend: str
    report: Report | None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.report is None:
            return {"backend": self.backend, "ok": None, "error": self.error}
        return {"top_1_agreement": self.top_1, **self.report.to_json()}

    @property
    def top_1(self) -> float | None:
        """Share of positions where the backend's choice is Hugging Face's, after the same tokens;
        None where nothing was run."""
        if self.report is None or self.report.measured is None:
            return None
        tokens = self.report.measured.tokens
        return tokens.num_equal / tokens.num_tokens


def verify_backends(
    source: Source,
    options: CompileOptions,
    backends: Sequence[str],
    artifact: str | None = None,
    *,
    own: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = logger.info,
    **workload: Any,
) -> list[Row]:
    """`verify_model` for each backend; workload: its prompts, num_prompts, max_tokens and seed.

    artifact: verify this one's backends instead of compiling. own: options that not all backends
    have, for those that do. What a backend cannot do is its row's error; OptionError is raised at
    once for a name that is no backend, and for an option that none of them has.
    """
    own = own or {}
    for name in own:
        if not set(BACKEND_OPTIONS[name]) & set(backends):
            raise OptionError(
                f"{name} is an option of backend={' or '.join(map(repr, BACKEND_OPTIONS[name]))}, "
                f"which is not among backends {', '.join(backends)}: leave it out"
            )
    chosen = [for_backend(options, name, own) for name in dict.fromkeys(backends)]
    return [_row(source, one, artifact, progress, workload) for one in chosen]


def for_backend(options: CompileOptions, backend: str, own: Mapping[str, Any]) -> CompileOptions:
    """The same options, with those of its own that this backend has."""
    has = {name: value for name, value in own.items() if backend in BACKEND_OPTIONS[name]}
    defaults = {name: getattr(CompileOptions, name) for name in BACKEND_OPTIONS}
    return replace(options, backend=backend, **{**defaults, **has})


def _row(
    source: Source,
    options: CompileOptions,
    artifact: str | None,
    progress: Callable[[str], None],
    workload: dict[str, Any],
) -> Row:
    name = options.backend
    try:
        engine = None if artifact is None else Engine.load(artifact, backend=name)
        report = verify_model(
            source,
            options,
            engine=engine,
            progress=lambda line: progress(f"{name}: {line}"),
            **workload,
        )
    except InlayError as error:
        return Row(name, None, f"{type(error).__name__}: {error}")
    return Row(name, report)


COLUMNS = ("greedy", "top-1", "largest diff", "RMS error", "KL mean", "KL max")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows for people, then what is to be said of those that are not right."""
    known = next((row.report for row in rows if row.report is not None), None)
    if known is not None:
        yield f"{known.model}: {known.dtype}, against Hugging Face in float32"
    width = max(12, *(len(row.backend) + 2 for row in rows))
    yield f"{'backend':{width}}" + "".join(f"{name:>14}" for name in COLUMNS) + "  verdict"
    for row in rows:
        yield (
            f"{row.backend:{width}}"
            + "".join(f"{cell:>14}" for cell in _cells(row))
            + (f"  {_verdict(row)}")
        )
    for row in rows:
        yield from _faults(row)


def _cells(row: Row) -> list[str]:
    measured = None if row.report is None else row.report.measured
    if row.report is None or measured is None:
        return ["-"] * len(COLUMNS)
    ours, top_1 = measured.ours, row.top_1
    greedy = f"{measured.num_greedy} of {len(row.report.prompt_lengths)}"
    numbers = (ours.largest, ours.rms, ours.kl_mean, ours.kl_max)
    return [greedy, f"{top_1:.2%}", *(f"{number:.1e}" for number in numbers)]


def _verdict(row: Row) -> str:
    if row.report is None:
        return "NOT RUN"
    return "agrees" if row.report.ok else "DISAGREES"


def _faults(row: Row) -> Iterator[str]:
    if row.report is None:
        yield f"{row.backend}: not run: {row.error}"
        return
    for fault in row.report.faults:
        yield f"{row.backend}: fault: {fault}"
    found = row.report.finding
    if found is not None:
        error = "" if found.error is None else f" (relative error {found.error:.1e})"
        yield f"{row.backend}: first difference: {found.what}{error}"
        for name in ("node", "module", "source"):
            if value := getattr(found, name):
                yield f"  {name}: {value}"
