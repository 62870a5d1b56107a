"""The C++ ops alone: attention and linear layers beside torch's own and the machine's limits.

    python -m inlay.bench.kernels_cpu [--threads 2] [--repeats 20] [linear products decode ...]

One JSON line for each measurement. What is compared runs in turns and the best of each counts;
outputs are compared first. With one thread the clock is that thread's CPU time, which a busy host
disturbs less. Linear layers are those of the 0.5b shape, all its weights in the model's order, so
that they come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from inlay.backends.kernels.cpu_ops import load_ops
from inlay.bench import attention_cpu
from inlay.bench.attention_cpu import Run, attention_call, best_seconds
from inlay.bench.products_cpu import bench_products
from inlay.bench.roofline import read_bandwidth
from inlay.bench.shapes import SHAPES

TOLERANCE = 2e-2
"""Relative error in norm, of bfloat16 against bfloat16."""


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < TOLERANCE, f"outputs differ by {error:.3f}: no speed is worth measuring"


def layer_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of a decoder layer's fused linears."""
    config = SHAPES[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv_width = 2 * config["num_key_value_heads"] * head_dim
    return {
        "qkv": (hidden + kv_width, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }


def bench_linear(repeats: int, shape: str = "0.5b") -> Iterator[dict[str, Any]]:
    """Packed linears beside F.linear for growing batches, in GB/s of weights."""
    shapes, config = layer_shapes(shape), SHAPES[shape]
    names = [name for _ in range(config["num_hidden_layers"]) for name in shapes] + ["lm_head"]
    shapes["lm_head"] = (config["vocab_size"], config["hidden_size"])
    plain = [torch.randn(shapes[name]).mul_(0.02).bfloat16() for name in names]
    packed = [torch.ops.inlay_cpu.pack_linear(weight) for weight in plain]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for num_rows in (1, 2, 4, 8, 16, 32, 64, 512):
        inputs = {n: torch.randn(num_rows, k).bfloat16() for n, (_, k) in shapes.items()}

        def ours(index: int, name: str, x: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
            return torch.ops.inlay_cpu.linear(x[name], packed[index], None, shapes[name][0])

        def theirs(index: int, name: str, x: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
            return F.linear(x[name], plain[index])

        for index in range(4):
            check_close(ours(index, names[index]), theirs(index, names[index]))
        calls = {"packed": ours, "F.linear": theirs}
        # The best of each layer's calls is summed: a pass is too long to stay undisturbed.
        best = {variant: [float("inf")] * len(names) for variant in calls}
        read = 0.0
        for _ in range(repeats):
            for variant, call in calls.items():
                for index, name in enumerate(names):
                    begin = clock()
                    call(index, name)
                    best[variant][index] = min(best[variant][index], clock() - begin)
            read = max(read, read_bandwidth(1))
        size = {name: 2 * n * k * names.count(name) for name, (n, k) in shapes.items()}
        for variant, times in best.items():
            total = sum(times)
            spent = dict.fromkeys(shapes, 0.0)
            for name, seconds in zip(names, times, strict=True):
                spent[name] += seconds
            rate = {name: size[name] / spent[name] / 1e9 for name in shapes}
            yield {
                "bench": "linear",
                "variant": variant,
                "rows": num_rows,
                "gb_s": {name: round(value, 1) for name, value in rate.items()},
                "all_ms": round(total * 1e3, 2),
                "all_gb_s": round(sum(size.values()) / total / 1e9, 1),
                "all_gflop_s": round(sum(size.values()) * num_rows / total / 1e9),
                "read_gb_s": round(read / 1e9, 1),
            }


def bench_calls(repeats: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a call that has next to nothing to compute."""
    x, weight = torch.randn(2, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    handle = torch.ops.inlay_cpu.pack_linear(weight)
    attention, _ = attention_call([(16, 1)] * 2, 2, 1, 64, torch.bfloat16, 16)
    runs: dict[str, Run] = {
        "linear": lambda: torch.ops.inlay_cpu.linear(x, handle, None, 64),
        "F.linear": lambda: F.linear(x, weight),
        "paged_attention": attention,
    }
    seconds = best_seconds(runs, 100 * repeats)
    yield {"bench": "calls", "us": {name: round(s * 1e6, 1) for name, s in seconds.items()}}


BENCHES: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "linear": bench_linear,
    "products": bench_products,
    **attention_cpu.BENCHES,
    "calls": bench_calls,
}


def run(names: Sequence[str], threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Each measurement of the named benches as it is done, with its conditions."""
    torch.set_num_threads(threads)
    load_ops()
    conditions = {
        "isa": torch.ops.inlay_cpu.get_isa(),
        "threads": threads,
        "torch": torch.__version__,
    }
    with torch.inference_mode():
        for name in names:
            for facts in BENCHES[name](repeats):
                yield {**facts, **conditions}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, []], metavar="bench")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    for facts in run(arguments.benches or list(BENCHES), arguments.threads, arguments.repeats):
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
