"""`inlay build MODEL -o DIR`: compile a model into an artifact, phase by phase.

What is given as flags may also stand in a YAML file, which flags override:

    model: meta-llama/Llama-3.2-1B
    output: llama-engine
    dtype: bfloat16
    quantization: {format: w4a16, group_size: 64}
"""

from __future__ import annotations

import argparse
import json
import sys
import time

PLACES = ("model", "output", "tokenizer")
"""What a build needs besides the fields of CompileOptions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.cli.options import add_dataclass_arguments
    from inlay.lowering.options import CompileOptions

    parser.add_argument("model", nargs="?", help="a directory, a hub id (owner/name), or 'demo'")
    parser.add_argument("-o", "--output", help="directory of the artifact")
    parser.add_argument("--tokenizer", help="directory or hub id, where not the model's own")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with any of: model, output, tokenizer and the options below, written "
        "with _ (max_seq_len: 4096); what is also given as a flag is taken from there",
    )
    add_dataclass_arguments(parser, CompileOptions)
    for name in vars(CompileOptions)["__dataclass_fields__"]:
        parser.set_defaults(**{name: None})  # only what is given overrides the file
    parser.set_defaults(parser=parser)


def run(arguments: argparse.Namespace) -> int:
    from inlay.cli.options import read_config
    from inlay.engine import build
    from inlay.lowering.options import CompileOptions

    names = (*PLACES, *vars(CompileOptions)["__dataclass_fields__"])
    flags = {name: v for name in names if (v := getattr(arguments, name)) is not None}
    given = {**(read_config(arguments.config, names, PLACES) if arguments.config else {}), **flags}
    model, output, tokenizer = (given.pop(name, None) for name in PLACES)
    missing = [f for f, v in (("model", model), ("-o/--output", output)) if v is None]
    if missing:
        arguments.parser.error(f"the following arguments are required: {', '.join(missing)}")
    options = CompileOptions.from_kwargs(given)
    begin = time.perf_counter()
    engine = build(
        model,
        output,
        options,
        tokenizer=tokenizer,
        progress=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    seconds = time.perf_counter() - begin
    manifest = engine.manifest
    if arguments.json:
        keys = ("architecture", "backend", "dtype", "phases", "errors", "target", "num_segments")
        facts = {key: manifest[key] for key in keys}
        print(json.dumps({"ok": True, "path": str(engine.path), "seconds": seconds, **facts}))
    else:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in manifest["errors"].items())
        print(
            f"{engine.path}: {manifest['architecture']}, {manifest['dtype']}, "
            f"{manifest['backend']}, built in {seconds:.1f} s; error against Hugging Face: {errors}"
        )
    return 0
