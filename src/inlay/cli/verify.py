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
    parser.add_argument(
        "--backends",
        metavar="NAME,NAME",
        help="run each of these, in place of --backend, and print one table",
    )
    add_dataclass_arguments(parser, CompileOptions, skip=("verify", "quantization"))


def run(arguments: argparse.Namespace) -> int:
    from inlay.cli.options import dataclass_from_arguments
    from inlay.engine import Engine
    from inlay.lowering.options import CompileOptions
    from inlay.verify import verify_model
    from inlay.verify.text import lines

    _check(arguments)
    engine = None
    if arguments.artifact is not None:
        engine = Engine.load(arguments.artifact, check_weights=True)
        arguments.backend, arguments.dtype = engine.backend, engine.manifest["dtype"]
    own = {} if arguments.backends is None else _take_own(arguments)
    options = dataclass_from_arguments(arguments, CompileOptions)
    source = _source(arguments, options)
    workload = {
        "prompts": _token_ids(source, arguments.prompt),
        "num_prompts": arguments.num_prompts,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "progress": lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    }
    if arguments.backends is not None:
        return _several(arguments, source, options, {**workload, "own": own})
    report = verify_model(source, options, engine=engine, **workload)
    print(json.dumps(report.to_json()) if arguments.json else "\n".join(lines(report)))
    return 0 if report.ok else 1


def _take_own(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given and not all backends have; they are not among the flags then."""
    from inlay.backends.base import BACKEND_OPTIONS
    from inlay.lowering.options import CompileOptions

    own = {}
    for name in BACKEND_OPTIONS:
        default = getattr(CompileOptions, name)
        if getattr(arguments, name, None) not in (None, default):
            own[name] = getattr(arguments, name)
            setattr(arguments, name, default)
    return own


def _several(arguments: argparse.Namespace, source: Any, options: Any, workload: Any) -> int:
    """Status 1 where one is wrong, else 2 where one could not be run."""
    from inlay.verify.backends import table, verify_backends

    names = [name.strip() for name in arguments.backends.split(",")]
    rows = verify_backends(source, options, names, arguments.artifact, **workload)
    verdicts = [None if row.report is None else row.report.ok for row in rows]
    if arguments.json:
        facts = [row.to_json() for row in rows]
        print(json.dumps({"ok": all(verdicts), "backends": facts}))
    else:
        print("\n".join(table(rows)))
    return 1 if False in verdicts else ERROR_STATUS if None in verdicts else 0


def _source(arguments: argparse.Namespace, options: Any) -> Any:
    from inlay.lowering.loading import load_source
    from inlay.verify.source import random_source

    trusted = options.trust_remote_code
    if not arguments.random_weights:
        return load_source(arguments.model, options.dtype, trust_remote_code=trusted)
    given = arguments.layers, arguments.seed
    return random_source(arguments.model, options.dtype, *given, trusted)


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
