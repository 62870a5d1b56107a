"""The C++ experts beside a plain loop of F.linear over the experts that have tokens.

    python -m inlay.bench.experts_cpu [--threads 2] [--repeats 20] [--rows 1 8 64 512]

One JSON line for each number of rows. Both run in turns and the best of each counts; outputs are
compared first. Layers of weights rotate, so that they come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.backends.kernels.cpu_ops import load_ops
from inlay.bench.kernels_cpu import best_seconds, check_close
from inlay.bench.roofline import read_bandwidth

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 32, 4, 1024, 512
NUM_LAYERS = 4
"""96 MB of weights each: more than any cache holds, all together."""


def loop(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What transformers' eager forward does, one expert after another."""
    out = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, upper = F.linear(x[token], up[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * upper, down[expert])
        out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out


def bench(num_rows: int, repeats: int, layers: list[tuple[Tensor, ...]]) -> dict[str, Any]:
    x = torch.randn(num_rows, HIDDEN).bfloat16()
    index = torch.stack([torch.randperm(NUM_EXPERTS)[:TOP_K] for _ in range(num_rows)])
    weights = torch.softmax(torch.randn(num_rows, TOP_K), dim=-1)
    ours, theirs = itertools.cycle(layers), itertools.cycle(layers)

    def packed() -> Tensor:
        *_, up, down = next(ours)
        return torch.ops.inlay_cpu.experts(x, index, weights, up, down, None, None, None)

    def plain() -> Tensor:
        up, down, *_ = next(theirs)
        return loop(x, index, weights, up, down)

    for _ in layers:
        check_close(packed(), plain())
    seconds = best_seconds({"packed": packed, "loop": plain}, repeats)
    num_read = index.unique().numel()
    size, work = 3 * HIDDEN * INNER, num_rows * TOP_K
    read = read_bandwidth(3)
    return {
        "bench": "experts",
        "rows": num_rows,
        "experts": [NUM_EXPERTS, TOP_K, HIDDEN, INNER],
        "experts_read": num_read,
        "dtype": "bfloat16",
        "ms": round(seconds["packed"] * 1e3, 3),
        "loop_ms": round(seconds["loop"] * 1e3, 3),
        "gb_s": round(2 * size * num_read / seconds["packed"] / 1e9, 1),
        "loop_gb_s": round(2 * size * num_read / seconds["loop"] / 1e9, 1),
        "read_gb_s": round(read / 1e9, 1),
        "gflop_s": round(2 * size * work / seconds["packed"] / 1e9),
        "loop_gflop_s": round(2 * size * work / seconds["loop"] / 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load_ops()
    conditions = {
        "isa": torch.ops.inlay_cpu.get_isa(),
        "threads": arguments.threads,
        "torch": torch.__version__,
    }
    layers = []
    for _ in range(NUM_LAYERS):
        up = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN).mul_(HIDDEN**-0.5).bfloat16()
        down = torch.randn(NUM_EXPERTS, HIDDEN, INNER).mul_(INNER**-0.5).bfloat16()
        handles = (torch.ops.inlay_cpu.pack_experts(w) for w in (up, down))
        layers.append((up, down, *handles))
    with torch.inference_mode():
        for num_rows in arguments.rows:
            facts = bench(num_rows, arguments.repeats, layers)
            print(json.dumps({**facts, **conditions}), flush=True)


if __name__ == "__main__":
    main()
