"""What a decode step costs by the interpreter of programs and by the C++ loop, in turns.

    python -m inlay.bench.step_cost ENGINE [--requests 1 32] [--steps 40] [--threads 1]

ENGINE is a saved engine of the Inductor backend. One JSON line for each number of requests, in
milliseconds a step: of CPU time of the stepping thread, which neighbours blur less, and by the
clock. "sampler" is the C++ loop with sampling in C++ as well, as it is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch

from inlay.backends.model import ProgramModel
from inlay.engine import Engine
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams

PROMPT = 128


def decoding(model: ProgramModel, num_requests: int, steps: int) -> Executor:
    """An executor whose requests have run their prompts, all the same one."""
    tokens = num_requests * (PROMPT + steps + 40 + 2 * model.limits.block_size)
    executor = Executor(model, ExecutorConfig(kv_cache_tokens=tokens, enable_prefix_caching=False))
    params = SamplingParams(max_tokens=steps + 40, temperature=0, ignore_eos=True)
    for index in range(num_requests):
        executor.add_request(NewRequest(str(index), list(range(1, PROMPT + 1)), params))
    while len(executor.step()) < num_requests:
        pass
    return executor


def measure(model: ProgramModel, num_requests: int, steps: int) -> dict[str, Any]:
    """One executor, whose steps go by each kind in turn: all give the same bits."""
    executor = decoding(model, num_requests, 3 * steps)
    loop, op = model._loop, executor.sampling.sampler._op
    kinds = {"interpreter": (None, None), "loop": (loop, None), "sampler": (loop, op)}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    wall: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(steps):
        for kind, chosen in kinds.items():
            model._loop, executor.sampling.sampler._op = chosen
            begin = time.thread_time(), time.perf_counter()
            outputs = executor.step()
            cpu[kind].append(1e3 * (time.thread_time() - begin[0]))
            wall[kind].append(1e3 * (time.perf_counter() - begin[1]))
            assert len(outputs) == num_requests, "not a step of all requests"
    model._loop = loop
    executor.shutdown()
    return {
        kind: {
            name: {"least": round(min(times), 2), "median": round(statistics.median(times), 2)}
            for name, times in (("cpu_ms", cpu[kind]), ("wall_ms", wall[kind]))
        }
        for kind in kinds
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Engine.load(arguments.engine).load_model()
    assert isinstance(model, ProgramModel)
    for num_requests in arguments.requests:
        facts = {
            "bench": "step_cost",
            "num_requests": num_requests,
            "prompt_tokens": PROMPT,
            "steps": arguments.steps,
            "num_layers": len(model.program.attention_steps),
            "dtype": model.program.dtype,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),
        }
        print(json.dumps(facts | measure(model, num_requests, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
