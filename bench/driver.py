"""Send requests to an LLM: all at once, or as a schedule wants them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from inlay.bench.datasets import Request
from inlay.bench.metrics import Record, record_of
from inlay.errors import EngineError, OptionError, RequestError
from inlay.llm import LLM
from inlay.runtime.sampling_params import SamplingParams

POLL_SECONDS = 0.1
"""How often the KV cache's use is asked for; the question is answered between two steps."""


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests are due.

    Gaps are gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process,
    less comes in bursts, more is steadier (vLLM's option). An infinite rate sends all at once.
    """
    if rate == float("inf"):
        return [0.0] * count
    generator = np.random.default_rng(seed)
    gaps = generator.gamma(burstiness, 1 / (rate * burstiness), count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


def check_rate(rate: float, burstiness: float, max_concurrency: int | None) -> None:
    """Raises OptionError."""
    if not rate > 0:
        raise OptionError(f"--request-rate must be above 0 requests/s, or inf; got {rate}")
    if not 0 < burstiness < float("inf"):
        raise OptionError(f"--burstiness must be above 0 (1 is Poisson); got {burstiness}")
    if max_concurrency is not None and max_concurrency < 1:
        raise OptionError(f"--max-concurrency must be at least 1; got {max_concurrency}")


def run_offline(llm: LLM, requests: Sequence[Request], params: SamplingParams) -> list[Record]:
    """All at once through `LLM.generate`, nothing streamed."""
    outputs = llm.generate(
        [request.token_ids for request in requests],
        [limited(params, request) for request in requests],
        use_tqdm=False,
    )
    begin = min(output.metrics.arrival_time for output in outputs)
    return [record_of(output, due=begin) for output in outputs]


def run_streams(
    llm: LLM,
    requests: Sequence[Request],
    params: SamplingParams,
    due: Sequence[float],
    max_concurrency: int | None = None,
) -> list[Record]:
    """Each at its time through `LLM.generate_async`, its stream read to the end in one event loop.

    A request that is refused or fails gives a record that says so; EngineError is raised.
    """

    async def all_of_them() -> list[Record]:
        gate: Any = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
        begin = time.perf_counter()
        tasks = [
            _one(llm, request, limited(params, request), begin + offset, gate)
            for request, offset in zip(requests, due, strict=True)
        ]
        return list(await asyncio.gather(*tasks))

    return asyncio.run(all_of_them())


async def _one(llm: LLM, request: Request, params: SamplingParams, due: float, gate: Any) -> Record:
    await asyncio.sleep(max(due - time.perf_counter(), 0))
    async with gate:
        sent = time.perf_counter()
        try:
            handle = llm.generate_async(request.token_ids, params, streaming=True)
        except RequestError as error:
            return Record(len(request.token_ids), 0, due, sent, reason="refused", error=str(error))
        times, num_tokens = list[float](), 0
        output: Any = None
        async for output in handle:
            came = len(output.outputs[0].token_ids) if output.outputs else 0
            if came > num_tokens:
                num_tokens = came
                times.append(time.perf_counter())
        return record_of(output, due, np.diff(times).tolist())


def limited(params: SamplingParams, request: Request) -> SamplingParams:
    """The same parameters with this request's output length."""
    return replace(params, max_tokens=request.max_tokens)


class Watch:
    """What the executor counts during a `with` block, and how full the KV cache is meanwhile."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._done = llm, threading.Event()
        self._usages: list[float] = []
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Watch:
        self._before = self._llm.get_stats()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            self._after = self._llm.get_stats()

    def _poll(self) -> None:
        while not self._done.wait(POLL_SECONDS if self._usages else POLL_SECONDS / 10):
            try:
                self._usages.append(self._llm.get_stats()["kv_cache_usage"])
            except EngineError:  # whoever waits for a request is told
                return

    def count(self, name: str) -> float:
        """What a counter gained."""
        return self._after[name] - self._before[name]

    def facts(self) -> dict[str, Any]:
        """For the results: steps, preemptions, KV use and prefix hits."""
        prompt_tokens = self.count("num_prompt_tokens")
        return {
            "num_steps": self.count("num_steps"),
            "num_preemptions": self.count("num_preemptions"),
            "kv_usage_peak": max(self._usages, default=None),
            "kv_usage_mean": float(np.mean(self._usages)) if self._usages else None,
            "kv_usage_samples": len(self._usages),
            "prefix_hit_rate": self.count("num_cached_tokens") / max(prompt_tokens, 1),
        }
