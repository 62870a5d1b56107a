"""Models of the sizes that are in use build and run: seconds, memory, tokens per second.

    python -m inlay.bench.sizes [--shape qwen3-0.6b ...] [--quantization w8a8 ...]

Random weights in bfloat16, written as a checkpoint. Each shape and precision is built cold (empty
caches) in a process of its own and runs in another. Prints a JSON line for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from inlay.bench.shapes import SHAPES, save_shape
from inlay.bench.startup import cold_build, run_watched

DEFAULT = ("qwen3-0.6b", "llama-3.2-1b", "gemma-2-2b", "moe-0.7b")

RUN = """
import json, sys, time
from inlay import LLM, Engine, SamplingParams
llm = LLM(Engine.load(sys.argv[1]), kv_cache_tokens=4096)
prompts = [[(7 * i + j) % 1000 + 5 for j in range(128)] for i in range(4)]
params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
llm.generate(prompts[:1], params, use_tqdm=False)
single = llm.generate(prompts[:1], params, use_tqdm=False)[0]
begin = time.perf_counter()
outputs = llm.generate(prompts, params, use_tqdm=False)
seconds = time.perf_counter() - begin
assert all(output.error is None for output in [single, *outputs]), "a request failed"
decode = single.metrics.finish_time - single.metrics.first_token_time
print(json.dumps({
    "ttft_128_s": round(single.metrics.ttft, 3),
    "decode_tokens_per_s": round(31 / decode, 1),
    "four_requests_output_tokens_per_s": round(4 * 32 / seconds, 1),
    "distinct_tokens": len(set(single.outputs[0].token_ids)),
}))
"""


def measure(shape: str, checkpoint: Path, quantization: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "build").mkdir()
        options = {} if quantization == "none" else {"quantization": quantization}
        built = cold_build(checkpoint, Path(folder) / "build", options)
        engine = Path(folder) / "build" / "engine"
        manifest = json.loads((engine / "inlay.json").read_text())
        environment = {**os.environ, "INLAY_CACHE_DIR": f"{folder}/build/cache"}
        _, peak, output = run_watched([sys.executable, "-c", RUN, str(engine)], environment)
    return {
        "bench": "sizes",
        "shape": shape,
        "dtype": "bfloat16",
        "quantization": quantization,
        "backend": "inductor",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "build": built,
        "errors": manifest["errors"],
        "run": {**json.loads(output.splitlines()[-1]), "peak_pss_mb": peak and round(peak / 1e6)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated")
    parser.add_argument("--quantization", action="append", help="none by default; repeatable")
    arguments = parser.parse_args()
    for shape in arguments.shape or DEFAULT:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = save_shape(shape, Path(folder))
            for quantization in arguments.quantization or ["none"]:
                print(json.dumps(measure(shape, checkpoint, quantization)), flush=True)


if __name__ == "__main__":
    main()
