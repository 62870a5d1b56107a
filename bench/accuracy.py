"""The demo model at every precision, and with narrow KV caches, judged on all of its held-out text.

    python -m inlay.bench.accuracy [--quantization w8a8 ...] [--kv-cache-dtype auto int8 fp8]
        [--output FILE]

Each is what `inlay eval` says: perplexity against Hugging Face in float32 over the same tokens,
with a paired 95 % interval, KL, top-1 agreement, greedy match, verdict. Exit status 1 where one
fails its limit.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from inlay import Engine, compile_model, evaluate
from inlay.bench import conditions
from inlay.errors import OptionError

PRECISIONS = ("none", "w8a16", "w8a8", "fp8", "w4a16")
CACHES = ("auto", "int8", "fp8")


def facts_of(engine: Engine, quantization: str, kv_cache_dtype: str) -> dict[str, Any]:
    found = evaluate(engine, kv_cache_dtype=kv_cache_dtype)
    return {
        "bench": "accuracy",
        **conditions.conditions(),
        "model": "demo",
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        **found.to_json(),
    }


def line_of(facts: dict[str, Any]) -> str:
    increase = facts["increase"]
    return (
        f"{facts['quantization']:>6}  KV {facts['kv_cache_dtype']:>5}  perplexity "
        f"{facts['perplexity']:.4f} of {facts['reference_perplexity']:.4f}: "
        f"{increase['value']:+.4%} ({increase['low']:+.4%} to {increase['high']:+.4%}, limit "
        f"{facts['limit']:.2%}) {facts['verdict']}; KL {facts['kl_mean']:.2e}, top-1 "
        f"{facts['top1_agreement']:.4f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quantization", nargs="+", default=PRECISIONS)
    parser.add_argument("--kv-cache-dtype", nargs="+", default=CACHES)
    parser.add_argument("--output", help="a JSONL file to add the results to")
    arguments = parser.parse_args()
    conditions.check_output(arguments.output)
    ok = True
    for quantization in arguments.quantization:
        engine = compile_model("demo", dtype="bfloat16", quantization=quantization)
        for kv_cache_dtype in arguments.kv_cache_dtype:
            facts = facts_of(engine, quantization, kv_cache_dtype)
            print(line_of(facts), flush=True)
            conditions.append(arguments.output, facts)
            ok &= facts["verdict"] == "pass"
    return 0 if ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptionError as error:
        sys.exit(f"accuracy: {error}")
