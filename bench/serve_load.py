"""`inlay bench serve-load MODEL`: requests that come at a rate, their streams read.

Through the asynchronous API in this process, `LLM.generate_async`: there is no HTTP server yet, and
none of its costs are in the figures. Tokenizing is done before; detokenizing is the API's.
"""

from __future__ import annotations

import argparse

from inlay.bench import datasets, session
from inlay.bench.driver import Watch, arrival_times, check_rate, run_streams
from inlay.bench.throughput import shares_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, repeats=1, warmups=8)
    add = parser.add_argument_group("load").add_argument
    add("--request-rate", type=float, default=float("inf"), metavar="R",
        help="requests/s, on average (inf: all at once)")  # fmt: skip
    add("--burstiness", type=float, default=1.0, metavar="B",
        help="shape of the gaps' gamma distribution: 1 (default) is a Poisson process, less comes "
        "in bursts, more is steadier")  # fmt: skip
    add("--max-concurrency", "--concurrency", type=int, metavar="N",
        help="requests under way at once; others wait, see the row `wait`")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    check_rate(arguments.request_rate, arguments.burstiness, arguments.max_concurrency)
    prepared = session.prepare(arguments, datasets.workload_of(arguments))
    requests, params = prepared.requests, prepared.params
    runs, watches = [], []
    with session.running(prepared):
        session.warm_up(prepared, requests[: arguments.num_warmups])
        for repeat in range(arguments.repeats):
            prepared.begin_run()
            due = arrival_times(
                len(requests),
                arguments.request_rate,
                arguments.burstiness,
                arguments.seed + repeat,
            )
            with Watch(prepared.llm) as watch:
                limit = arguments.max_concurrency
                runs.append(run_streams(prepared.llm, requests, params, due, limit))
            watches.append(watch)
        prepared.begin_run()
        facts = session.facts_of(prepared, "serve-load", runs, watches)
    facts |= {"roofline": shares_of(prepared, runs, watches), "api": "in process, no HTTP"}
    return session.finish(arguments, facts)
