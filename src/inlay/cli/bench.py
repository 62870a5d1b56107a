"""`inlay bench throughput | latency | serve-load | kernels | startup | compare`.

Each is a module of bench/ with `add_arguments(parser)` and `run(arguments) -> int`, imported only
when it is chosen.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

BENCHES = {
    "throughput": "many requests, all there from the start",
    "latency": "one batch of a fixed size, again and again",
    "serve-load": "requests that come at a rate, through the asynchronous API (no HTTP)",
    "kernels": "products, attention and sampler on this machine",
    "startup": "cold and warm build, load and first token, each in a fresh process",
    "compare": "Inlay beside other engines",
}
MODULES = {name: name.replace("-", "_") for name in BENCHES}


class _LazyParser(argparse.ArgumentParser):
    """Gets its flags when it is chosen, so that no other command pays for their imports."""

    bench: str | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.bench is not None:
            module_of(self.bench).add_arguments(self)
            self.bench = None
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(
        dest="bench", required=True, metavar="bench", parser_class=_LazyParser
    )
    for name, text in BENCHES.items():
        benches.add_parser(name, help=text, description=text).bench = name


def run(arguments: argparse.Namespace) -> int:
    return int(module_of(arguments.bench).run(arguments))


def module_of(bench: str) -> Any:
    return importlib.import_module(f"inlay.bench.{MODULES[bench]}")
