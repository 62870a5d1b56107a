"""`inlay build MODEL -o DIR`: compile a model into an artifact, phase by phase."""

from __future__ import annotations

import argparse
import json
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.cli.options import add_dataclass_arguments
    from inlay.lowering.options import CompileOptions

    parser.add_argument("model", help="a directory, a hub id (owner/name), or 'demo'")
    parser.add_argument("-o", "--output", required=True, help="directory of the artifact")
    parser.add_argument("--tokenizer", help="directory or hub id, where not the model's own")
    add_dataclass_arguments(parser, CompileOptions)


def run(arguments: argparse.Namespace) -> int:
    from inlay.cli.options import dataclass_from_arguments
    from inlay.engine import build
    from inlay.lowering.options import CompileOptions

    options = dataclass_from_arguments(arguments, CompileOptions)
    begin = time.perf_counter()
    engine = build(
        arguments.model,
        arguments.output,
        options,
        tokenizer=arguments.tokenizer,
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
