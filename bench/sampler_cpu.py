"""What the sampler's kernels cost: 64 rows of 32,000 float32 logits, on a CPU.

    OMP_NUM_THREADS=2 python -m inlay.bench.sampler_cpu [--repeats 60]

Rows are normal with three spreads: 6 (a sure model), 3, and 0.01 (flat, the worst for top-p).
Prints a JSON line: milliseconds of wall clock, the least and the median, and of the calling thread;
and what sorting the rows costs. Of a machine that others use too, the least tells more.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


def timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    for _ in range(3):
        run()
    wall, thread = [], []
    for _ in range(repeats):
        begin = time.perf_counter(), time.thread_time()
        run()
        wall.append(1e3 * (time.perf_counter() - begin[0]))
        thread.append(1e3 * (time.thread_time() - begin[1]))
    return {
        "least_ms": round(min(wall), 2),
        "median_ms": round(statistics.median(wall), 2),
        "thread_median_ms": round(statistics.median(thread), 2),
    }


def measure(repeats: int) -> dict[str, Any]:
    generator, slots = torch.Generator().manual_seed(0), np.arange(ROWS)
    noise = torch.randn(ROWS, VOCAB_SIZE, generator=generator)
    kinds: dict[str, Any] = {}
    for name, options in KINDS.items():
        sampler = Sampler(ROWS, torch.device("cpu"))
        params = SamplingParams(**options)
        sampler.launch_slots(sampler.plan_slots([(slot, params, slot) for slot in range(ROWS)]))
        draws = sampler.plan(slots, slots)
        kinds[name] = {
            f"spread {spread:g}": timed(partial(sampler.launch, draws, noise * spread), repeats)
            for spread in SPREADS
        }
    return {**kinds, "sort, for comparison": timed(lambda: noise.sort(-1), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    repeats = parser.parse_args().repeats
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    conditions = {
        "bench": "sampler_cpu",
        "shape": [ROWS, VOCAB_SIZE],
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu.group(1) if cpu else "unknown",
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(conditions | measure(repeats)), flush=True)


if __name__ == "__main__":
    main()
