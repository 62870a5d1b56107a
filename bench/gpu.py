"""What GPU benches have in common: probes of the device, and items that are run in order."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch

from inlay.bench import conditions
from inlay.errors import InlayError

READ_BYTES = 2 << 30
"""Far beyond the second-level cache."""

Item = tuple[str, Callable[[], dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument("--output", metavar="FILE", help="a JSONL file to add each result to")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu only tries the script")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=seconds,
                        help=f"begin no further item after this long ({seconds:g})")  # fmt: skip


def run_items(bench: str, items: Iterable[Item], arguments: argparse.Namespace) -> int:
    """Each item's facts as a line of JSON as soon as it is done; what fails or comes too late is a
    line that says so. Exit status 1 where one failed."""
    conditions.check_output(arguments.output)
    end, status = time.monotonic() + arguments.seconds, 0
    for name, call in items:
        facts: dict[str, Any] = {"bench": bench, "item": name}
        if time.monotonic() > end:
            facts["skipped"] = f"{arguments.seconds:g} s were over"
        else:
            begin = time.monotonic()
            try:
                facts |= call()
            except Exception as error:  # whatever a peer raises: told, and the others go on
                traceback.print_exc()
                facts["error"] = f"{type(error).__name__}: {error}"[:500]
                status = 1
            facts["took_s"] = round(time.monotonic() - begin, 1)
        facts |= {"gpu": gpu_name(arguments.device), **conditions.conditions()}
        conditions.append(arguments.output, facts)
        print(json.dumps(facts), flush=True)
    return status


def gpu_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "none: a trial on the CPU"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], device: str, repeats: int = 20) -> float:
    """The median of a call's times, measured by the device's clock, caches flushed before each."""
    for _ in range(3):
        call()
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # a millisecond, in which all of the call is queued
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        times.append(begin_event.elapsed_time(end_event) / 1000)
    return median(times)


def read_bandwidth(device: str) -> float:
    """Bytes per second of one stream that is read: the best of a few tries."""
    size = READ_BYTES if device == "cuda" else 1 << 24
    data = torch.ones(size // 4, device=device)
    return max(size / seconds_of(lambda: torch.sum(data), device, 5) for _ in range(3))


def exit_with(main: Callable[[], int]) -> None:
    try:
        sys.exit(main())
    except InlayError as error:
        sys.exit(f"inlay bench: {error}")
