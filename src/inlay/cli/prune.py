"""`inlay prune ARTIFACT -o DIR`: the artifact without its weights."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="a directory that `inlay build` wrote")
    parser.add_argument("-o", "--output", required=True, help="directory of the pruned artifact")


def run(arguments: argparse.Namespace) -> int:
    from inlay.backends.prune import size_of
    from inlay.engine import Engine

    engine = Engine.load(arguments.artifact)
    pruned = engine.prune(arguments.output)
    before, after = size_of(engine.artifact), size_of(pruned.artifact)
    count = len(pruned.manifest["pruned"]["weights"])
    if arguments.json:
        sizes = {"bytes_before": before, "bytes_after": after}
        print(json.dumps({"ok": True, "path": str(pruned.path), "weights": count, **sizes}))
    else:
        print(
            f"{pruned.path}: {count} weights taken out, {before / 1e6:.1f} MB before, "
            f"{after / 1e6:.1f} MB after; `inlay refit` gives it weights again"
        )
    return 0
