"""What a step of decoding requests costs the host: schedule, prepare, launch, read, hand out.

    python -m inlay.bench.host_cost [--windows 0 512] [--requests 64]

The model costs nothing: its logits are a fixed tensor. The sampler's kernels are timed and taken
away, since they are the device's; all else that a step does is Python, NumPy and small copies.
Prints a table and one JSON line: medians and minima of milliseconds a step, by the clock and in
CPU time of the thread, which neighbours blur less. Beside them what the way to the API's process
adds: packing and unpacking a step's outputs, and making request outputs of them.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from inlay.backends.base import KVGroup, ModelLimits
from inlay.backends.step import StepInputs
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.ledger import Ledger, Pending
from inlay.runtime.messages import Outputs, decode, encode
from inlay.runtime.output_processor import OutputProcessor
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams

PHASES = ("schedule", "prepare", "launch", "wait", "output")
BLOCK_SIZE = 16
VOCAB_SIZE = 32_000


class StillModel:
    """A LoadedModel that answers at once, always the same."""

    def __init__(self, num_requests: int, max_seq_len: int, windows: Sequence[int]) -> None:
        self.is_encoder = False
        self.device = torch.device("cpu")
        self.limits = ModelLimits(
            vocab_size=VOCAB_SIZE,
            max_seq_len=max_seq_len,
            max_num_tokens=2048,
            max_num_seqs=num_requests,
            block_size=BLOCK_SIZE,
        )
        self.kv_groups = tuple(KVGroup(window, 1, 16 * BLOCK_SIZE) for window in windows)
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(num_requests + 8, VOCAB_SIZE, generator=generator)

    def kv_groups_for(self, dtype: str | None) -> tuple[KVGroup, ...]:
        return self.kv_groups

    def allocate_kv_cache(self, num_blocks: int | Sequence[int], dtype: str | None = None) -> None:
        """Nothing is ever written."""

    def kv_tensors(self, group: int) -> list[torch.Tensor]:
        return []

    def make_batch_invariant(self) -> None:
        """Nothing is computed."""

    def forward(self, step: StepInputs) -> torch.Tensor:
        return self._logits[: len(step.logits_indices)]

    def forward_pieces(self, step: StepInputs) -> torch.Tensor:
        return self.forward(step)

    def forward_hidden(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward(step), torch.zeros(len(step.input_ids), 1)


class Timer:
    """Times calls in milliseconds: by the clock, and of this thread's CPU."""

    def __init__(self) -> None:
        self.wall: defaultdict[str, list[float]] = defaultdict(list)
        self.cpu: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def run(*args: Any, **options: Any) -> Any:
            begin, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self.cpu[name].append((time.thread_time() - cpu) * 1e3)
                self.wall[name].append((time.perf_counter() - begin) * 1e3)

        return run


def full_executor(args: argparse.Namespace, params: SamplingParams) -> Executor:
    """An executor whose requests have all run their prompts."""
    max_seq_len = args.prompt + args.steps + 210
    model = StillModel(args.requests, max_seq_len, args.windows)
    tokens = args.requests * (max_seq_len + BLOCK_SIZE)
    executor = Executor(model, ExecutorConfig(kv_cache_tokens=tokens))
    random = np.random.default_rng(0)
    for index in range(args.requests):
        length = args.prompt + int(random.integers(0, 100))
        prompt = random.integers(0, VOCAB_SIZE, length).tolist()
        executor.add_request(NewRequest(str(index), prompt, params))
    while len(executor.step()) < args.requests:
        pass
    return executor


def measure(executor: Executor, args: argparse.Namespace) -> tuple[Timer, list[StepOutput]]:
    """Times of steps that decode all requests, and the outputs of the last one."""
    timer = Timer()
    sampling = executor.sampling
    for name in ("plan", "launch", "read"):
        setattr(sampling, name, timer.timed(f"sampling.{name}", getattr(sampling, name)))
    step = timer.timed("step", executor.step)
    before = executor.get_stats()
    outputs: list[StepOutput] = []
    for _ in range(args.steps):
        outputs = step()
        after = executor.get_stats()
        for name in PHASES:
            timer.wall[name].append(1e3 * (after[f"{name}_time"] - before[f"{name}_time"]))
        before = after
        assert len(outputs) == args.requests, "not a step of all requests"
    for clock in (timer.wall, timer.cpu):
        pairs = zip(clock["step"], clock["sampling.launch"], strict=True)
        clock["host"] = [step - kernels for step, kernels in pairs]
    return timer, outputs


def measure_way_out(outputs: list[StepOutput], timer: Timer, repeats: int) -> None:
    """A step's outputs on their way to who waits for them, as token ids and as text."""
    folder = Path(str(files("inlay"))) / "demo_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, processor in (
        ("ids", OutputProcessor(None)),
        ("text", OutputProcessor(tokenizer)),
    ):
        ledger, pending = Ledger(processor.process, lambda error: None), Pending()
        params = SamplingParams(max_tokens=None)
        for output in outputs:
            request = NewRequest(output.request_id, [1], params)
            ledger.add(request)
            pending.add(request)
            processor.add(output.request_id, None, [1], params, is_stream=True)
        for number in range(repeats):
            step = [
                replace(one, token_ids=((number * 7 + place) % 4000 + 50,))
                for place, one in enumerate(outputs)
            ]
            timer.timed("worker: settle", pending.settle)(step)
            frame = timer.timed("worker: encode", encode)(Outputs(step))
            message = timer.timed("client: decode", decode)(frame)
            assert isinstance(message, Outputs)
            timer.timed(f"client: {name}", ledger.deliver)(message.outputs)


def profile(executor: Executor, num_steps: int) -> None:
    """Print which functions the steps' time goes to."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(num_steps):
        executor.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(35)


def summary(timer: Timer) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of what was timed, by the clock and in CPU time."""
    found: dict[str, dict[str, float]] = {}
    for name, wall in timer.wall.items():
        found[name] = {"median_ms": statistics.median(wall), "min_ms": min(wall)}
        if cpu := timer.cpu.get(name):
            found[name] |= {"cpu_median_ms": statistics.median(cpu), "cpu_min_ms": min(cpu)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=400, help="tokens, and up to 99 more")
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="of each KV group")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="print cProfile's view instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    params = SamplingParams(max_tokens=args.steps + 100, temperature=0.0, ignore_eos=True)
    executor = full_executor(args, params)
    if args.profile:
        profile(executor, args.steps)
        return
    timer, outputs = measure(executor, args)
    measure_way_out(outputs, timer, args.steps)
    rows = summary(timer)
    for name, row in rows.items():
        print(f"{name:18}", "  ".join(f"{key} {value:6.3f}" for key, value in row.items()))
    facts = {
        "bench": "host_cost",
        "num_requests": args.requests,
        "prompt_tokens": args.prompt,
        "kv_groups": args.windows,
        "block_size": BLOCK_SIZE,
        "vocab_size": VOCAB_SIZE,
        "sampling": "greedy",
        "steps": args.steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "limit_ms": 1.5,
        "ms": {name: {key: round(ms, 3) for key, ms in row.items()} for name, row in rows.items()},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
