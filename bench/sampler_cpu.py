"""What sampling costs on a CPU: 64 rows of logits, by the C++ op and by Python, in turns.

    OMP_NUM_THREADS=2 python -m inlay.bench.sampler_cpu [--repeats 60] [--vocab 32000]

Rows are normal with three spreads: 6 (a sure model), 3, and 0.01 (flat, the worst for top-p). The
tokens of both are compared first. Prints a JSON line: milliseconds of wall clock, the least and the
median, and of the calling thread; and what sorting the rows costs. Of a machine that others use
too, the least tells more; with one thread the calling thread's time is free of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.backends.kernels.cpu_ops import load_ops
from inlay.runtime.sampler import Sampler
from inlay.runtime.sampling_params import SamplingParams

ROWS, VOCAB_SIZE, SPREADS = 64, 32_000, (6.0, 3.0, 0.01)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_k 40": {"top_k": 40},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
}


def timed(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, run in turns."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    thread: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter(), time.thread_time()
            run()
            wall[name].append(1e3 * (time.perf_counter() - begin[0]))
            thread[name].append(1e3 * (time.thread_time() - begin[1]))
    return {
        name: {
            "least_ms": round(min(wall[name][1:]), 3),
            "median_ms": round(statistics.median(wall[name][1:]), 3),
            "thread_median_ms": round(statistics.median(thread[name][1:]), 3),
        }
        for name in runs
    }


def measure(
    repeats: int, vocab_size: int = VOCAB_SIZE, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    load_ops()
    generator, slots = torch.Generator().manual_seed(0), np.arange(ROWS)
    noise = torch.randn(ROWS, vocab_size, generator=generator)
    kinds: dict[str, Any] = {}
    for name, options in KINDS.items():
        samplers = Sampler(ROWS, torch.device("cpu")), Sampler(ROWS, torch.device("cpu"))
        samplers[1]._op = None
        params = SamplingParams(**options)
        for sampler in samplers:
            new = [(slot, params, slot) for slot in range(ROWS)]
            sampler.launch_slots(sampler.plan_slots(new))
        draws = samplers[0].plan(slots, slots)
        kinds[name] = {}
        for spread in SPREADS:
            logits = (noise * spread).to(dtype)
            runs = {
                by: partial(sampler.launch, draws, logits)
                for by, sampler in zip(("op", "python"), samplers, strict=True)
            }
            assert torch.equal(runs["op"](), runs["python"]()), "tokens differ"
            kinds[name][f"spread {spread:g}"] = timed(runs, repeats)
    return {**kinds, **timed({"sort, for comparison": lambda: noise.sort(-1)}, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--vocab", type=int, default=VOCAB_SIZE)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    conditions = {
        "bench": "sampler_cpu",
        "shape": [ROWS, arguments.vocab],
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu.group(1) if cpu else "unknown",
        "load": round(os.getloadavg()[0], 1),
    }
    found = measure(arguments.repeats, arguments.vocab, getattr(torch, arguments.dtype))
    print(json.dumps(conditions | found), flush=True)


if __name__ == "__main__":
    main()
