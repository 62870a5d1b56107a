"""`inlay demo`: the whole way with the shipped model, each step shown, the tokens checked."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPTS = (
    "The for statement is used to",
    "Return a new list",
    "A class definition",
    "If the argument is a string, it",
    "Raises ValueError if",
    "The import statement combines two operations; it searches for the named module, then it",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="inductor", help="inductor (default) or eager")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens per prompt (48)")
    parser.add_argument("-o", "--output", help="keep the artifact in this directory")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(arguments.output or Path(scratch) / "demo-engine")
        return _run(arguments, target)


def _run(arguments: argparse.Namespace, target: Path) -> int:
    from inlay import LLM, Engine, SamplingParams
    from inlay.engine import build
    from inlay.lowering.options import CompileOptions

    def say(text: str) -> None:
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    begin = time.perf_counter()
    say(f"1. Compile the shipped model ({arguments.backend}, {arguments.dtype}) into an artifact")
    options = CompileOptions(backend=arguments.backend, dtype=arguments.dtype)
    build("demo", target, options, progress=lambda line: say(f"   {line}"))
    engine = Engine.load(target, check_weights=True)
    manifest = engine.manifest
    for report in manifest["passes"]:
        due = "" if report["expected"] is None else f" of {report['expected']} expected"
        say(f"   pass {report['name']}: {report['matches']}{due}")
    layers = len(engine.artifact.program.attention_steps)
    say(f"   {layers} layers in {manifest['num_segments']} distinct segments")
    for what, error in manifest["errors"].items():
        say(f"   {what} against Hugging Face: relative error {error:.1e}")

    say(f"2. Load the artifact and generate for {len(PROMPTS)} requests at once")
    params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    with LLM(engine) as llm:
        start = time.perf_counter()
        outputs = llm.generate(list(PROMPTS), params, use_tqdm=False)
        seconds = time.perf_counter() - start
    for output in outputs:
        say(f"   {output.prompt!r} -> {output.outputs[0].text!r}")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    say(f"   {num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.0f} tokens/s)")

    say("3. Check every token against Hugging Face in float32")
    comparison = _compare(outputs, manifest["errors"]["engine"])
    say(
        f"   {comparison.num_equal} of {comparison.num_tokens} tokens equal, "
        f"{comparison.num_excused} excused by a near tie, {comparison.num_wrong} wrong"
    )
    total = time.perf_counter() - begin
    if arguments.json:
        texts = [output.outputs[0].text for output in outputs]
        facts = {"seconds": total, "texts": texts, "errors": manifest["errors"]}
        counts = {"num_tokens": comparison.num_tokens, "num_equal": comparison.num_equal}
        print(json.dumps({"ok": comparison.passed, **facts, **counts}))
    verdict = "All is well" if comparison.passed else "WRONG TOKENS"
    say(f"{verdict} ({total:.1f} s)")
    return 0 if comparison.passed else 1


def _compare(outputs: Any, relative_error: float) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from inlay.lowering.loading import resolve
    from inlay.verify import compare_greedy

    reference = AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32).eval()
    return compare_greedy(outputs, reference, relative_error)
