"""`inlay bench latency MODEL`: one batch of a fixed size, again and again.

Its requests are sent together and their streams read; the row `batch` is the time from the first
one sent to the last one finished. Prefill and decode have their own share of the roofline.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean, median
from typing import Any

from inlay.bench import datasets, metrics, session
from inlay.bench.driver import Watch, run_streams
from inlay.bench.roofline import decode_share, prefill_share
from inlay.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, repeats=5, warmups=1)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="requests (1)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1 or arguments.num_prompts is not None:
        raise OptionError(
            f"latency takes --batch-size, at least 1, and no --num-prompts; got "
            f"{arguments.batch_size} and {arguments.num_prompts}"
        )
    workload = replace(datasets.workload_of(arguments), num_prompts=arguments.batch_size)
    prepared = session.prepare(arguments, workload)
    requests, due = prepared.requests, [0.0] * arguments.batch_size
    runs, watches = [], []
    with session.running(prepared):
        for _ in range(arguments.num_warmups):
            session.warm_up(prepared, requests)
        for _ in range(arguments.repeats):
            prepared.begin_run()
            with Watch(prepared.llm) as watch:
                runs.append(run_streams(prepared.llm, requests, prepared.params, due))
            watches.append(watch)
        prepared.begin_run()
        facts = session.facts_of(prepared, "latency", runs, watches)
    facts["batch_ms"] = metrics.distribution(map(metrics.span, runs))
    facts["roofline"] = _shares(prepared, runs)
    return session.finish(arguments, facts)


def _shares(prepared: session.Session, runs: list[list[metrics.Record]]) -> dict[str, float | None]:
    """Of prefill by the median time to the last first token, of decode by the median TPOT.

    None where requests share prefixes or have one token only, so that there is no such phase.
    """
    records = [record for run in runs for record in run if record.completed]
    cost = session.cost_of(prepared)
    inputs = [len(request.token_ids) for request in prepared.requests]
    rate = session.product_rate_of(prepared, cost, sum(inputs))
    facts: dict[str, Any] = {"prefill_share": None, "decode_share": None}
    firsts = [
        max(r.first_token for r in run if r.first_token is not None) - min(r.sent for r in run)
        for run in runs
        if all(record.completed for record in run)
    ]
    if firsts and not any(record.num_cached for record in records):
        facts["prefill_share"] = prefill_share(cost, inputs, median(firsts), rate)
    # Only the last one to begin decodes beside no other's prefill.
    last = [max(run, key=lambda record: record.first_token or 0.0) for run in runs]
    tpots = [record.tpot for record in last if record.completed and record.tpot is not None]
    if tpots:
        contexts = [
            round(mean([len(r.token_ids) + 1, len(r.token_ids) + r.max_tokens - 1]))
            for r in prepared.requests
        ]
        facts["decode_share"] = decode_share(cost, contexts, median(tpots), prepared.bandwidth)
    return facts | {"read_gb_s": prepared.bandwidth / 1e9, "product_gflop_s": rate / 1e9}
