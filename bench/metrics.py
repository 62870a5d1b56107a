"""What a run's requests give: latencies, throughput, goodput, and the formulas behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.errors import OptionError
from inlay.runtime.outputs import RequestOutput

PERCENTILES = (50, 90, 99)
COMPLETED = ("length", "stop")
"""Finish reasons of a request that got what it asked for."""

FORMULAS = {
    "TTFT": "first token - sent",
    "TPOT": "(finish - first token) / (output tokens - 1): the first token is prefill's and does "
    "not count; a request of one token has no TPOT",
    "ITL": "each gap between outputs that reached a stream's reader; over all gaps of all requests",
    "E2E": "finish - sent",
    "wait": "sent - due: how long a request waited for a free place (--max-concurrency)",
    "percentiles": "p of n sorted values x[0..n-1] is x at place p/100 * (n-1), linear in between "
    "(NumPy's default); over completed requests, without warm-up",
    "throughput": "tokens or requests of completed requests / (last finish - first due)",
    "goodput": "completed requests that meet every --goodput limit / (last finish - first due)",
}
"""Times are those of the process that calls the API, on one clock; tokenizing comes before."""

LIMITS = {"ttft": "ttft", "tpot": "tpot", "e2el": "e2e"}
"""Names of --goodput, vLLM's, and of the records' properties."""


@dataclass(frozen=True)
class Record:
    """How one request went; times in seconds on one clock, None where it did not come so far.

    due: when the schedule wanted it sent. gaps: seconds between the outputs that its reader got;
    None where nothing was streamed. reason: the finish reason, or "refused". error: what failed.
    """

    num_input: int
    num_output: int
    due: float
    sent: float
    first_token: float | None = None
    finish: float | None = None
    num_cached: int = 0
    gaps: tuple[float, ...] | None = None
    reason: str = "length"
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.reason in COMPLETED and self.error is None

    @property
    def wait(self) -> float:
        return self.sent - self.due

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.sent

    @property
    def e2e(self) -> float | None:
        return None if self.finish is None else self.finish - self.sent

    @property
    def tpot(self) -> float | None:
        """None for a request of one token: all of its time is prefill's."""
        if self.finish is None or self.first_token is None or self.num_output < 2:
            return None
        return (self.finish - self.first_token) / (self.num_output - 1)


def record_of(
    output: RequestOutput, due: float | None = None, gaps: Sequence[float] | None = None
) -> Record:
    """The record of a finished output; due is its arrival where there was no schedule."""
    metrics, (completion, *_) = output.metrics, output.outputs
    error = output.error
    return Record(
        num_input=len(output.prompt_token_ids),
        num_output=len(completion.token_ids),
        due=metrics.arrival_time if due is None else due,
        sent=metrics.arrival_time,
        first_token=metrics.first_token_time,
        finish=metrics.finish_time,
        num_cached=metrics.num_cached_tokens,
        gaps=None if gaps is None else tuple(gaps),
        reason=completion.finish_reason or "error",
        error=None if error is None else f"{type(error).__name__}: {error}",
    )


def distribution(seconds: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None where there is nothing to take them of."""
    values = np.array([value for value in seconds if value is not None])
    if not len(values):
        return None
    cuts = np.percentile(values, PERCENTILES) * 1e3
    named = {f"p{p}": float(cut) for p, cut in zip(PERCENTILES, cuts, strict=True)}
    return {"mean": float(values.mean() * 1e3), **named}


def span(records: Sequence[Record]) -> float:
    """Seconds from the first request's due time to the last one's end; 0 where none ended."""
    ends = [record.finish for record in records if record.finish is not None]
    return max(ends) - min(record.due for record in records) if ends else 0.0


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds of "ttft:200"; OptionError for what is no limit."""
    limits: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in LIMITS or not 0 < limit < float("inf"):
            raise OptionError(
                f"--goodput takes {', '.join(LIMITS)} with milliseconds, as ttft:200; got {text!r}"
            )
        limits[name] = limit
    return limits


def meets(record: Record, limits: Mapping[str, float]) -> bool:
    """Whether a request was completed within all limits; one without a value breaks none."""
    values = ((getattr(record, LIMITS[name]), limit) for name, limit in limits.items())
    return record.completed and all(v is None or v * 1e3 <= limit for v, limit in values)


def summarize(
    runs: Sequence[Sequence[Record]], goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Latencies pooled over a workload's repeats, rates as the median of the repeats'."""
    records = [record for run in runs for record in run]
    done = [record for record in records if record.completed]
    gaps = None
    if any(record.gaps is not None for record in done):
        gaps = distribution(gap for record in done for gap in record.gaps or ())
    failures = Counter(_failure(record) for record in records if not record.completed)
    rates = [_rates(run, goodput) for run in runs]
    return {
        "num_completed": len(done),
        "num_failed": len(records) - len(done),
        "failures": dict(failures.most_common()),
        "num_input_tokens": sum(record.num_input for record in done),
        "num_output_tokens": sum(record.num_output for record in done),
        "seconds": float(np.median([span(run) for run in runs])),
        **{name: float(np.median([rate[name] for rate in rates])) for name in rates[0]},
        "output_tokens_per_s_of_repeats": [rate["output_tokens_per_s"] for rate in rates],
        "ttft_ms": distribution(record.ttft for record in done),
        "tpot_ms": distribution(record.tpot for record in done),
        "itl_ms": gaps,
        "e2e_ms": distribution(record.e2e for record in done),
        "wait_ms": distribution(record.wait for record in done),
    }


def _rates(run: Sequence[Record], goodput: Mapping[str, float] | None) -> dict[str, float]:
    done, seconds = [record for record in run if record.completed], span(run)
    counts = {
        "requests_per_s": len(done),
        "input_tokens_per_s": sum(record.num_input for record in done),
        "output_tokens_per_s": sum(record.num_output for record in done),
        "total_tokens_per_s": sum(record.num_input + record.num_output for record in done),
    }
    if goodput:
        counts["goodput_per_s"] = sum(meets(record, goodput) for record in run)
    return {name: count / seconds if seconds else 0.0 for name, count in counts.items()}


def _failure(record: Record) -> str:
    """How a request failed: its finish reason, and the error where there is one."""
    return record.reason if record.error is None else f"{record.reason}: {record.error}"
