"""`inlay inspect MODEL [-o report.html]`: how a model is lowered, what it costs to run; or
`inlay inspect ARTIFACT`: what is in it, how large, where it came from, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SKIP = ("backend", "optimization_level", "verify", "quantization")
"""Options of a build that mean nothing here: nothing is compiled, and every pass is checked. Those
that only one backend has mean nothing either."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.backends.base import BACKEND_OPTIONS
    from inlay.cli.options import add_dataclass_arguments
    from inlay.lowering.options import CompileOptions

    parser.add_argument("model", help="an artifact, a directory, a hub id (owner/name), or 'demo'")
    parser.add_argument("-o", "--output", help="write the report as one HTML page to this file")
    parser.add_argument(
        "--check-weights",
        action="store_true",
        help="also compare an artifact's weights' hashes; those of all else always are",
    )
    machine = parser.add_argument_group("roofline of the page; measured here where not given")
    machine.add_argument("--bandwidth", type=float, metavar="GB/s", help="memory bandwidth")
    machine.add_argument("--flops", type=float, metavar="GFLOP/s", help="matrix product rate")
    lowering = parser.add_argument_group("lowering, where a model is given")
    add_dataclass_arguments(lowering, CompileOptions, skip=(*SKIP, *BACKEND_OPTIONS))
    for name in vars(CompileOptions)["__dataclass_fields__"]:
        parser.set_defaults(**{name: None})  # an artifact has its own; only what is given counts


def run(arguments: argparse.Namespace) -> int:
    from inlay.report.page import render

    target = None if arguments.output is None else check_output(arguments)
    check_rates(arguments)
    report, shown, text = collect(arguments)
    if target is not None:
        write(target, render(report, *machine_of(arguments, report.dtype)))
    failure = report.failure
    if arguments.json:
        error = {"error": failure.kind, "message": failure.message} if failure else {}
        print(json.dumps({"ok": failure is None, **error, **shown}))
    else:
        print(text if target is None else target)
    if failure is not None:
        print(f"inlay inspect: {failure.kind}: {failure.message}", file=sys.stderr)
    return 0 if failure is None else 1


def collect(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any], str]:
    """The report, and the same as data and as text."""
    from inlay.engine import Engine, is_artifact
    from inlay.errors import OptionError
    from inlay.lowering.options import CompileOptions
    from inlay.report.artifact import artifact_data, artifact_text
    from inlay.report.collect import of_artifact, of_model
    from inlay.report.text import as_data, as_text

    fields = CompileOptions.__dataclass_fields__
    given = {n: v for n in fields if (v := getattr(arguments, n, None)) is not None}
    place = Path(arguments.model)
    if is_artifact(place):
        if given:
            raise OptionError(
                f"{', '.join(given)} cannot be changed for the artifact {place}; build another "
                "with `inlay build`"
            )
        engine = Engine.load(place, check_weights=arguments.check_weights)
        report = of_artifact(arguments.model, engine)
        data = artifact_data(engine, report, arguments.check_weights)
        return report, data, artifact_text(data)
    if place.is_dir() and not (place / "config.json").is_file():
        raise OptionError(
            f"directory {place} is not an Inlay artifact (it has no inlay.json) and not a Hugging "
            "Face model (it has no config.json)"
        )
    if arguments.check_weights:
        raise OptionError("--check-weights is for artifacts: a model's files have no hashes here")
    options = CompileOptions(**{"backend": "eager", "verify": "pass", **given})
    report = of_model(arguments.model, options, tell(arguments))
    return report, as_data(report), as_text(report)


def tell(arguments: argparse.Namespace) -> Any:
    """Says what is going on, where a person may be waiting for it."""
    if arguments.json:
        return lambda line: None
    return lambda line: print(f"  {line}", file=sys.stderr, flush=True)


def check_output(arguments: argparse.Namespace) -> Path:
    """Where the page goes; asked before the work is done that it would show.

    Raises OptionError for a place that cannot take it.
    """
    from inlay.engine import is_artifact
    from inlay.errors import OptionError

    target = Path(arguments.output)
    if target.is_dir():
        raise OptionError(f"output must be a file, and {target} is a directory; name a file in it")
    if not target.resolve().parent.is_dir():
        raise OptionError(f"output {target} lies in a directory that does not exist; make it first")
    inside = Path(arguments.model).resolve() in target.resolve().parents
    if is_artifact(arguments.model) and inside:
        raise OptionError(
            f"output {target} lies in the artifact, whose every file is listed and hashed; name a "
            "file outside it"
        )
    return target


def check_rates(arguments: argparse.Namespace) -> None:
    from inlay.errors import OptionError

    for name in ("bandwidth", "flops"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"--{name} must be a positive number, got {value}")


def machine_of(arguments: argparse.Namespace, dtype: str) -> tuple[Any, bool]:
    """Bytes and operations per second, and whether both were measured here."""
    import torch

    from inlay.bench.roofline import product_rate, read_bandwidth
    from inlay.report.cost import Machine

    bandwidth, flops = arguments.bandwidth, arguments.flops
    machine = Machine(
        bandwidth=read_bandwidth() if bandwidth is None else bandwidth * 1e9,
        flops=product_rate(getattr(torch, dtype)) if flops is None else flops * 1e9,
    )
    return machine, bandwidth is None and flops is None


def write(target: Path, page: str) -> None:
    """Raises OptionError where the file cannot be written."""
    from inlay.errors import OptionError

    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"output {target} cannot be written: {error}") from error
