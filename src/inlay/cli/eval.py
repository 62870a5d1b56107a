"""`inlay eval MODEL ...`: how much worse than its checkpoint is an engine? The verdict is kept."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

ERROR_STATUS = 2
"""Of what could not be judged; 1 means that it was, and failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.cli.options import add_dataclass_arguments
    from inlay.eval.options import EvalOptions
    from inlay.lowering.options import CompileOptions

    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="an artifact, a directory, a hub id (owner/name), or 'demo'; several of one "
        "checkpoint share one run of the reference",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text (default: the demo model's held-out text)"
    )
    parser.add_argument(
        "--reference", metavar="DIR", help="the checkpoint, where not what the engine names"
    )
    parser.add_argument("--tokenizer", help="directory or hub id, where not the model's own")
    judging = parser.add_argument_group("judging")
    add_dataclass_arguments(judging, EvalOptions)
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'inlay[eval]')")
    tasks.add_argument("--tasks", metavar="NAME,NAME,...", help="run these instead of a text")
    tasks.add_argument("--include-path", metavar="DIR", help="directory with tasks of your own")
    tasks.add_argument("--num-fewshot", type=int, metavar="int", help="examples in each prompt")
    tasks.add_argument("--num-samples", type=int, metavar="int", help="of each task (default: all)")
    compiling = parser.add_argument_group("compiling, where a model is given")
    add_dataclass_arguments(compiling, CompileOptions)
    for name in vars(CompileOptions)["__dataclass_fields__"]:
        parser.set_defaults(**{name: None})  # an artifact has its own; only what is given counts


def run(arguments: argparse.Namespace) -> int:
    from inlay.cli.run import open_or_compile

    options = check(arguments)
    engines = [
        open_or_compile(argparse.Namespace(**{**vars(arguments), "model": model}))
        for model in arguments.models
    ]
    return run_tasks(arguments, engines) if arguments.tasks else judge(arguments, engines, options)


def check(arguments: argparse.Namespace) -> Any:
    """The options of judging; OptionError before anything is loaded."""
    from inlay.cli.options import dataclass_from_arguments
    from inlay.errors import OptionError
    from inlay.eval.options import EvalOptions
    from inlay.eval.text import read_text

    if not arguments.tasks:
        for name in ("include_path", "num_fewshot", "num_samples"):
            if getattr(arguments, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')} needs --tasks NAME,NAME,...")
        read_text(arguments.text)
    elif arguments.text is not None:
        raise OptionError("--text and --tasks are two ways to judge: give one of them")
    return dataclass_from_arguments(arguments, EvalOptions)


def judge(arguments: argparse.Namespace, engines: list[Any], options: Any) -> int:
    """Exit status: 0 where all passed, 1 where one failed, 2 where one is undecided."""
    from inlay.eval import evaluate_all
    from inlay.eval.evaluation import FAIL
    from inlay.eval.report import lines

    evaluations = evaluate_all(
        engines,
        text=arguments.text,
        reference=arguments.reference,
        tokenizer=arguments.tokenizer,
        options=options,
        progress=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    ok = all(one.ok for one in evaluations)
    if arguments.json:
        pairs = zip(arguments.models, evaluations, strict=True)
        facts = [{"model": name, **one.to_json()} for name, one in pairs]
        print(json.dumps({"ok": ok, "evaluations": facts}))
    else:
        print("\n".join(lines(arguments.models, evaluations)))
    if ok:
        return 0
    return 1 if any(one.verdict == FAIL for one in evaluations) else ERROR_STATUS


def run_tasks(arguments: argparse.Namespace, engines: list[Any]) -> int:
    from inlay.eval.tasks import evaluate_tasks, table

    results = {
        name: evaluate_tasks(
            engine,
            arguments.tasks.split(","),
            tokenizer=arguments.tokenizer,
            include_path=arguments.include_path,
            num_fewshot=arguments.num_fewshot,
            num_samples=arguments.num_samples,
            kv_cache_dtype=arguments.kv_cache_dtype,
        )
        for name, engine in zip(arguments.models, engines, strict=True)
    }
    if arguments.json:
        print(json.dumps({"ok": True, "results": results}))
    else:
        print("\n".join(line for one in results.items() for line in table(*one)))
    return 0
