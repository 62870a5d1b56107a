"""Mixed traffic for minutes on end: no request lost, no memory gained.

    python -m inlay.bench.load [--seconds 600] [--backend inductor] [--clients 32]

The demo model behind `LLM`, in its own process. First 500 requests are queued at once. When they
are done, clients send requests of all kinds until the time is up: read to the end, streamed,
abandoned, aborted at random times, timed out, with n > 1, beams, log probabilities, shared
prefixes, embeddings, scores. Every request must end once, and as its client asked. Resident memory
of both processes is read every second of that time; its growth is the median of the last fifth over
that of the second fifth. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import psutil
import torch

from inlay import LLM, SamplingParams
from inlay.handle import RequestHandle

NUM_QUEUED = 500
PATIENCE = 300.0
"""Seconds that a client waits for a request before it is called lost."""

NUM_PREFIXES = 6


@dataclass
class Traffic:
    """One engine's traffic. asked, ended: requests by kind, and by (kind, finish reason)."""

    llm: LLM
    texts: list[list[int]]
    asked: Counter[str] = field(default_factory=Counter)
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prompt(self, choice: random.Random) -> list[int]:
        """Text from anywhere, short or long; every third begins as others do."""
        text = choice.choice(self.texts[NUM_PREFIXES:])
        start = choice.randrange(len(text) // 2)
        rest = text[start : start + choice.choice([3, 10, 30, 60, 200])]
        shared = self.texts[choice.randrange(NUM_PREFIXES)][: choice.choice([40, 130])]
        return shared + rest if choice.random() < 0.33 else rest

    def send(
        self, kind: str, prompt: list[int], params: SamplingParams, **options: Any
    ) -> RequestHandle:
        """Queue a request that will be ended once."""
        with self.lock:
            self.asked[kind] += 1
        return self.llm.generate_async(prompt, params, **options)

    def note(self, kind: str, reason: str, num_tokens: int = 0) -> None:
        """A request has ended."""
        with self.lock:
            self.ended[kind, reason] += 1
            self.num_tokens += num_tokens

    def finish(self, kind: str, handle: RequestHandle) -> None:
        """Wait for a request's end, and check that it is whole."""
        try:
            output = handle.result(timeout=PATIENCE)
        except TimeoutError:
            self.note(kind, "lost")
            return
        reasons = {one.finish_reason or "none" for one in output.outputs}
        reason = min(reasons) if output.error is None else "error"
        self.note(kind, reason, sum(len(one.token_ids) for one in output.outputs))


def random_params(choice: random.Random, **fields: Any) -> SamplingParams:
    """Parameters of any kind."""
    more: dict[str, Any] = choice.choice(
        [
            {"temperature": 0.0},
            {"temperature": 0.0, "no_repeat_ngram_size": 3},
            {"top_p": 0.9, "top_k": 50},
            {"top_p": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
            {"min_p": 0.05, "logit_bias": {5: 2.0, 17: -3.0}, "min_tokens": 4},
            {"typical_p": 0.9, "bad_words_ids": [[7], [8, 9]]},
            {"seed": choice.randrange(1000), "stop": ["def ", "\n\n"]},
        ]
    )
    return SamplingParams(**{"max_tokens": choice.choice([4, 16, 16, 48, 150]), **more, **fields})


# What clients do. Each sends one request and sees to its end.


def _whole(traffic: Traffic, choice: random.Random) -> None:
    params = random_params(choice, ignore_eos=choice.random() < 0.3)
    options = {"priority": choice.choice([0, 0, 1]), "cache_salt": choice.choice([None, "salt"])}
    traffic.finish("whole", traffic.send("whole", traffic.prompt(choice), params, **options))


def _streamed(traffic: Traffic, choice: random.Random) -> None:
    handle = traffic.send("streamed", traffic.prompt(choice), random_params(choice), streaming=True)
    text = ""
    for output in handle:
        text += output.outputs[0].delta
    assert text == output.outputs[0].text, "the pieces of a stream are not its whole"
    traffic.finish("streamed", handle)


def _abandoned(traffic: Traffic, choice: random.Random) -> None:
    """Its client forgets it: the engine must end it by itself."""
    params = random_params(choice, max_tokens=400, ignore_eos=True)
    handle = traffic.send("abandoned", traffic.prompt(choice), params, streaming=True)
    pieces = iter(handle)
    for _ in range(choice.randrange(5)):
        next(pieces, None)
    traffic.note("abandoned", "forgotten")


def _aborted(traffic: Traffic, choice: random.Random) -> None:
    params = random_params(choice, max_tokens=choice.choice([30, 400]))
    handle = traffic.send("aborted", traffic.prompt(choice), params)
    time.sleep(choice.choice([0.0, 0.001, 0.05, 0.3, 1.0]))
    handle.abort()
    traffic.finish("aborted", handle)


def _timed_out(traffic: Traffic, choice: random.Random) -> None:
    params = random_params(choice, max_tokens=400, ignore_eos=True)
    timeout = choice.choice([0.01, 0.1, 0.5])
    handle = traffic.send("timed out", traffic.prompt(choice), params, timeout=timeout)
    traffic.finish("timed out", handle)


def _several(traffic: Traffic, choice: random.Random) -> None:
    n = choice.choice([2, 3, 5])
    best_of = choice.choice([None, n + 2])
    params = SamplingParams(n=n, best_of=best_of, max_tokens=choice.choice([5, 40]), top_p=0.95)
    handle = traffic.send("several", traffic.prompt(choice), params)
    if choice.random() < 0.2:
        time.sleep(choice.random() / 4)
        handle.abort()
    traffic.finish("several", handle)


def _beams(traffic: Traffic, choice: random.Random) -> None:
    params = SamplingParams(
        n=2,
        best_of=choice.choice([2, 4]),
        use_beam_search=True,
        temperature=0.0,
        max_tokens=choice.choice([5, 20]),
    )
    handle = traffic.send("beams", traffic.prompt(choice), params)
    if choice.random() < 0.2:
        time.sleep(choice.random() / 4)
        handle.abort()
    traffic.finish("beams", handle)


def _logprobs(traffic: Traffic, choice: random.Random) -> None:
    params = random_params(choice, logprobs=5, prompt_logprobs=choice.choice([None, 2]))
    traffic.finish("logprobs", traffic.send("logprobs", traffic.prompt(choice), params))


def _blocking(
    kind: str, call: Callable[[Traffic, list[int]], Any]
) -> Callable[[Traffic, random.Random], None]:
    def client(traffic: Traffic, choice: random.Random) -> None:
        with traffic.lock:
            traffic.asked[kind] += 1
        (output,) = call(traffic, traffic.prompt(choice))
        traffic.note(kind, "stop" if output.error is None else "error")

    return client


def _embed(traffic: Traffic, prompt: list[int]) -> Any:
    return traffic.llm.embed([prompt], use_tqdm=False)


def _score(traffic: Traffic, prompt: list[int]) -> Any:
    return traffic.llm.score([prompt], use_tqdm=False)


KINDS: list[tuple[Callable[[Traffic, random.Random], None], int]] = [
    (_whole, 6),
    (_streamed, 4),
    (_abandoned, 3),
    (_aborted, 4),
    (_timed_out, 2),
    (_several, 2),
    (_beams, 1),
    (_logprobs, 2),
    (_blocking("embedded", _embed), 1),
    (_blocking("scored", _score), 1),
]
"""Clients, and how often each comes."""


def client(traffic: Traffic, seed: int, end: float, failures: list[BaseException]) -> None:
    """Send one request after the other until `end`, on the clock of time.monotonic()."""
    choice = random.Random(seed)
    calls, weights = zip(*KINDS, strict=True)
    try:
        while time.monotonic() < end:
            choice.choices(calls, weights)[0](traffic, choice)
    except BaseException as error:
        failures.append(error)


def queue_at_once(traffic: Traffic, count: int) -> None:
    """Many requests before the first is waited for; all must end."""
    choice = random.Random(0)
    handles = [
        traffic.send("queued", traffic.prompt(choice), random_params(choice)) for _ in range(count)
    ]
    for handle in handles:
        traffic.finish("queued", handle)


@dataclass
class MemoryLog:
    """Resident memory of this process and of the engine's, in bytes, second by second."""

    rows: list[tuple[float, int, int]] = field(default_factory=list)

    def run(self, done: threading.Event, interval: float) -> None:
        """Sample until done."""
        here = psutil.Process()
        while not done.wait(interval):
            try:
                worker = sum(one.memory_info().rss for one in here.children())
            except psutil.NoSuchProcess:
                continue
            self.rows.append((time.monotonic(), here.memory_info().rss, worker))

    def growth(self) -> dict[str, float]:
        """Median of the last fifth over that of the second fifth, less 1."""
        fifth = len(self.rows) // 5
        found = {}
        for name, read in (
            ("parent", lambda row: row[1]),
            ("worker", lambda row: row[2]),
            ("both", lambda row: row[1] + row[2]),
        ):
            values = [read(row) for row in self.rows]
            begin = statistics.median(values[fifth : 2 * fifth])
            found[name] = statistics.median(values[-fifth:]) / begin - 1
        return found

    def megabytes(self) -> dict[str, list[int]]:
        """Twenty values of each, evenly over the time."""
        rows = self.rows[:: max(len(self.rows) // 20, 1)]
        return {
            name: [round(row[place] / 1e6) for row in rows]
            for name, place in (("parent", 1), ("worker", 2))
        }


def wait_until_idle(llm: LLM, seconds: float = 30.0) -> dict[str, Any]:
    """The statistics once nothing is under way, what was forgotten included."""
    end = time.monotonic() + seconds
    while True:
        stats = llm.get_stats()
        busy = stats["num_running"] + stats["num_waiting"] + stats["api"]["num_unfinished"]
        if not busy or time.monotonic() > end:
            return stats
        time.sleep(0.1)


def run(llm: LLM, seconds: float, num_queued: int, num_clients: int) -> dict[str, Any]:
    """The whole run's facts; see `problems` for what must not be in them."""
    text = (files("inlay") / "demo_model" / "heldout.txt").read_text(encoding="utf-8")
    ids = llm.tokenize(text)
    texts = [ids[start : start + 500] for start in range(0, len(ids) - 500, 500)]
    traffic, memory = Traffic(llm, texts), MemoryLog()
    done, failures = threading.Event(), list[BaseException]()
    watcher = threading.Thread(target=memory.run, args=(done, min(1.0, seconds / 50)))
    begin = time.monotonic()
    queue_at_once(traffic, num_queued)
    queued_seconds = time.monotonic() - begin
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(traffic, 1 + index, end, failures))
        for index in range(num_clients)
    ]
    watcher.start()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        watcher.join()
    stats = wait_until_idle(llm)
    for error in failures:
        raise error
    seconds = time.monotonic() - begin
    return {
        "seconds": round(seconds, 1),
        "queued_at_once": num_queued,
        "queued_seconds": round(queued_seconds, 1),
        "asked": dict(traffic.asked),
        "ended": {f"{kind}: {reason}": n for (kind, reason), n in sorted(traffic.ended.items())},
        "num_asked": sum(traffic.asked.values()),
        "num_finished": stats["api"]["num_finished"],
        "num_unfinished": stats["api"]["num_unfinished"],
        "num_running": stats["num_running"],
        "num_waiting": stats["num_waiting"],
        "kv_cache_usage": stats["kv_cache_usage"],
        "prefix_hit_rate": round(stats["prefix_hit_rate"], 2),
        "num_steps": stats["num_steps"],
        "num_preemptions": stats["num_preemptions"],
        "output_tokens_per_s": round(stats["num_sampled_tokens"] / seconds),
        "prompt_tokens_per_s": round(stats["num_prefill_tokens"] / seconds),
        "rss_growth": {name: round(value, 4) for name, value in memory.growth().items()},
        "rss_mb": memory.megabytes(),
    }


EXPECTED = {
    "queued": {"stop", "length"},
    "whole": {"stop", "length"},
    "streamed": {"stop", "length"},
    "abandoned": {"forgotten"},
    "aborted": {"stop", "length", "abort"},
    "timed out": {"stop", "length", "timeout"},
    "several": {"stop", "length", "abort"},
    "beams": {"stop", "length", "abort"},
    "logprobs": {"stop", "length"},
    "embedded": {"stop"},
    "scored": {"stop"},
}
"""Why requests of each kind may end."""


def problems(facts: dict[str, Any], most_growth: float) -> list[str]:
    """What is wrong with a run."""
    found = []
    ended: Counter[str] = Counter()
    for name, count in facts["ended"].items():
        kind, reason = name.split(": ")
        ended[kind] += count
        if reason not in EXPECTED[kind]:
            found.append(f"{count} requests of kind {kind!r} ended with {reason!r}")
    if dict(ended) != facts["asked"]:
        found.append(f"asked {facts['asked']}, ended {dict(ended)}")
    if sum(facts["num_finished"].values()) != facts["num_asked"]:
        found.append(f"{facts['num_asked']} requests, finished {facts['num_finished']}")
    for name in ("num_unfinished", "num_running", "num_waiting", "kv_cache_usage"):
        if facts[name]:
            found.append(f"at the end {name} is {facts[name]}")
    growth = facts["rss_growth"]
    found += [f"{name} grew by {growth[name]:.1%}" for name in growth if growth[name] > most_growth]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=3072)
    parser.add_argument("--policy", default="max_utilization")
    args = parser.parse_args()
    with LLM(
        "demo",
        backend=args.backend,
        max_num_seqs=32,
        max_seq_len=1024,
        kv_cache_tokens=args.kv_tokens,
        scheduler_policy=args.policy,
        num_threads=1,
    ) as llm:
        facts = run(llm, args.seconds, NUM_QUEUED, args.clients)
    found = problems(facts, most_growth=0.02)
    conditions = {
        "bench": "load",
        "model": "demo",
        "backend": args.backend,
        "scheduler_policy": args.policy,
        "kv_cache_tokens": args.kv_tokens,
        "max_num_seqs": 32,
        "num_clients": args.clients,
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps({**conditions, **facts, "problems": found}))
    if found:
        raise SystemExit("; ".join(found))


if __name__ == "__main__":
    main()
