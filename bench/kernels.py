"""`inlay bench kernels`: products, attention and sampler alone, beside the machine's limits."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

import torch

from inlay.bench import conditions, kernels_cpu, sampler_cpu
from inlay.errors import OptionError

SAMPLER = "sampler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = (*kernels_cpu.BENCHES, SAMPLER)
    parser.add_argument(
        "kernels", nargs="*", metavar="kernel", help=f"{', '.join(names)}; none means all"
    )
    parser.add_argument("--threads", "--num-threads", type=int, metavar="N", help="(all cores)")
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="of which the best counts (20)"
    )
    parser.add_argument(
        "--output", "-o", metavar="FILE", help="append the results to this file, lines of JSON"
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="those lines on stdout"
    )


def run(arguments: argparse.Namespace) -> int:
    known = (*kernels_cpu.BENCHES, SAMPLER)
    names = arguments.kernels or known
    threads = arguments.threads or len(os.sched_getaffinity(0))
    if unknown := sorted(set(names) - set(known)):
        raise OptionError(f"kernel must be one of {', '.join(known)}; got {unknown[0]}")
    for name, value in (("threads", threads), ("repeats", arguments.repeats)):
        if value < 1:
            raise OptionError(f"--{name} must be at least 1, got {value}")
    conditions.check_output(arguments.output)
    common = conditions.conditions()
    for facts in _measured(names, threads, arguments.repeats):
        line = {**facts, "repeats": arguments.repeats, **common}
        conditions.append(arguments.output, line)
        print(json.dumps(line) if getattr(arguments, "json", False) else shown(facts), flush=True)
    return 0


def shown(facts: dict[str, Any]) -> str:
    """One measurement in a line of text."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
            parts.append(f"{name} ({value})")
        elif name != "bench":
            parts.append(f"{name} {value}")
    return f"{facts['bench']}: {'; '.join(parts)}"


def _measured(names: Any, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    yield from kernels_cpu.run([n for n in names if n != SAMPLER], threads, repeats)
    if SAMPLER in names:
        torch.set_num_threads(threads)
        shape = [sampler_cpu.ROWS, sampler_cpu.VOCAB_SIZE]
        for kind, rows in sampler_cpu.measure(repeats).items():
            yield {"bench": SAMPLER, "kind": kind, "shape": shape, "threads": threads, **rows}
