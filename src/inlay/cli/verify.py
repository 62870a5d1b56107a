"""`inlay verify MODEL`: does the compiled model compute what Hugging Face computes?"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

ERROR_STATUS = 2
"""Of what could not be verified; 1 means that it was, and is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.cli.options import add_dataclass_arguments
    from inlay.lowering.options import CompileOptions

    parser.add_argument("model", help="a directory, a hub id (owner/name), or 'demo'")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="take the config alone and give it random weights; MODEL may then also be a "
        "config.json, or a model type of transformers with its default config",
    )
    parser.add_argument("--layers", type=int, help="with --random-weights: this many layers")
    parser.add_argument("--artifact", help="verify this artifact of MODEL instead of compiling it")
    parser.add_argument(
        "-p", "--prompt", action="append", default=[], help="may be repeated (default: random ids)"
    )
    parser.add_argument("--num-prompts", type=int, default=16, help="random prompts (16)")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens for each prompt (32)")
    parser.add_argument("--seed", type=int, default=0, help="of random ids and weights (0)")
    add_dataclass_arguments(parser, CompileOptions, skip=("verify", "quantization"))


def run(arguments: argparse.Namespace) -> int:
    from inlay.cli.options import dataclass_from_arguments
    from inlay.engine import Engine
    from inlay.lowering.loading import load_source
    from inlay.lowering.options import CompileOptions
    from inlay.verify import verify_model
    from inlay.verify.source import random_source
    from inlay.verify.text import lines

    _check(arguments)
    engine = None
    if arguments.artifact is not None:
        engine = Engine.load(arguments.artifact, check_weights=True)
        arguments.backend, arguments.dtype = engine.backend, engine.manifest["dtype"]
    options = dataclass_from_arguments(arguments, CompileOptions)
    if arguments.random_weights:
        source = random_source(
            arguments.model,
            options.dtype,
            arguments.layers,
            arguments.seed,
            options.trust_remote_code,
        )
    else:
        source = load_source(
            arguments.model, options.dtype, trust_remote_code=options.trust_remote_code
        )
    report = verify_model(
        source,
        options,
        engine=engine,
        prompts=_token_ids(source, arguments.prompt),
        num_prompts=arguments.num_prompts,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        progress=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    print(json.dumps(report.to_json()) if arguments.json else "\n".join(lines(report)))
    return 0 if report.ok else 1


def _check(arguments: argparse.Namespace) -> None:
    from inlay.errors import OptionError

    for name in ("num_prompts", "max_tokens"):
        if getattr(arguments, name) < 1:
            given = getattr(arguments, name)
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {given}")
    if arguments.model.endswith(".json") and not arguments.random_weights:
        raise OptionError(
            f"{arguments.model} is a config: verify it with --random-weights, or give the "
            "checkpoint's directory"
        )
    if arguments.layers is not None and not arguments.random_weights:
        raise OptionError("--layers needs --random-weights: a checkpoint is as deep as it is")


def _token_ids(source: Any, prompts: list[str]) -> list[list[int]]:
    from inlay.errors import OptionError

    if prompts and source.tokenizer is None:
        raise OptionError(f"--prompt needs a tokenizer, and {source.name} has none; leave it out")
    return [source.tokenizer(prompt)["input_ids"] for prompt in prompts]
