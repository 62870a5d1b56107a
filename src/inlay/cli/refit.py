"""`inlay refit ARTIFACT --weights CHECKPOINT -o DIR`: the same code with other weights."""

from __future__ import annotations

import argparse
import json
import sys
import time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.lowering.options import VERIFY

    parser.add_argument("artifact", help="a directory that `inlay build` or `inlay prune` wrote")
    parser.add_argument(
        "--weights", required=True, help="a directory, a hub id (owner/name), or 'demo'"
    )
    parser.add_argument("-o", "--output", required=True, help="directory of the new artifact")
    parser.add_argument("--tokenizer", help="directory or hub id, where not the checkpoint's own")
    parser.add_argument(
        "--verify",
        choices=VERIFY[:2],
        help="'engine' compares the result with Hugging Face as a build does, 'capture' the graph "
        "alone, without running the code (default: what the build did)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the checkpoint; read it first",
    )


def run(arguments: argparse.Namespace) -> int:
    from inlay.engine import Engine

    begin = time.perf_counter()
    engine = Engine.load(arguments.artifact).refit(
        arguments.weights,
        arguments.output,
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
        verify=arguments.verify,
        progress=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    seconds = time.perf_counter() - begin
    manifest = engine.manifest
    if arguments.json:
        facts = {key: manifest[key] for key in ("phases", "errors", "provenance")}
        print(json.dumps({"ok": True, "path": str(engine.path), "seconds": seconds, **facts}))
    else:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in manifest["errors"].items())
        print(
            f"{engine.path}: {manifest['architecture']}, {manifest['dtype']}, "
            f"{manifest['backend']}, refitted in {seconds:.1f} s; error against Hugging Face: "
            f"{errors}"
        )
    return 0
