"""`inlay bench throughput MODEL`: many requests, all there from the start.

Through `LLM.generate`; with --streaming through `LLM.generate_async`, which gives ITL too.
"""

from __future__ import annotations

import argparse

from inlay.bench import datasets, session
from inlay.bench.driver import Watch, run_offline, run_streams
from inlay.bench.metrics import span
from inlay.bench.roofline import load_shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, repeats=1, warmups=8)
    parser.add_argument(
        "--streaming", action="store_true", help="read every stream, which measures ITL"
    )


def run(arguments: argparse.Namespace) -> int:
    prepared = session.prepare(arguments, datasets.workload_of(arguments))
    requests, params = prepared.requests, prepared.params
    runs, watches = [], []
    with session.running(prepared):
        session.warm_up(prepared, requests[: arguments.num_warmups])
        for _ in range(arguments.repeats):
            prepared.begin_run()
            with Watch(prepared.llm) as watch:
                if arguments.streaming:
                    runs.append(run_streams(prepared.llm, requests, params, [0.0] * len(requests)))
                else:
                    runs.append(run_offline(prepared.llm, requests, params))
            watches.append(watch)
        prepared.begin_run()
        facts = session.facts_of(prepared, "throughput", runs, watches)
    return session.finish(arguments, facts | {"roofline": shares_of(prepared, runs, watches)})


def shares_of(
    prepared: session.Session, runs: list[list[session.metrics.Record]], watches: list[Watch]
) -> dict[str, float]:
    """The roofline of whole loads, all repeats as one."""
    cost = session.cost_of(prepared)
    return load_shares(
        cost,
        [record for run in runs for record in run],
        round(sum(watch.count("num_steps") for watch in watches)),
        sum(map(span, runs)),
        prepared.bandwidth,
        session.product_rate_of(prepared, cost, session.PRODUCT_ROWS),
    )
