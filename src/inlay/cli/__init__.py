"""The `inlay` command. Each subcommand is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

COMMANDS = {
    "demo": "compile, save, load and run the shipped model, and check its tokens",
    "build": "compile a model into an artifact",
    "prune": "take the weights out of an artifact: code, graphs and manifest stay",
    "refit": "give an artifact the weights of another checkpoint of the same model",
    "run": "generate text from an artifact or a model",
    "verify": "compare a compiled model with Hugging Face, and find where they part",
    "bench": "measure throughput, latency, kernels and start-up, or compare with other engines",
    "eval": "judge a compiled model's accuracy against its checkpoint on a text, or on tasks",
    "inspect": "show how a model was lowered and what it costs to run, or what an artifact holds",
    "cache": "list or remove what is kept between builds",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and containers send: what is half done is put away, as for ^C."""


def _terminate(*_: object) -> None:
    raise Terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all is well, 1 when something is wrong, 2 for a wrong command line (and
    where `verify` or `eval` could not be run, since 1 is their verdict), 130 when interrupted,
    143 when terminated."""
    try:
        module, arguments = _parse(argv)
    except KeyboardInterrupt:
        print("inlay: interrupted", file=sys.stderr)
        return 130
    return _run(module, arguments)


def _parse(argv: Sequence[str] | None) -> tuple[object, argparse.Namespace]:
    """A command's module and its flags."""
    import inlay

    parser = argparse.ArgumentParser(prog="inlay", description="Compile and run language models.")
    parser.add_argument("--version", action="version", version=f"inlay {inlay.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    modules = {}
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        command.add_argument("-v", "--verbose", action="store_true", help="log what is done")
        modules[name] = importlib.import_module(f"inlay.cli.{name}")
        modules[name].add_arguments(command)
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    return modules[arguments.command], arguments


def _run(module: object, arguments: argparse.Namespace) -> int:
    from inlay.errors import InlayError

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _terminate)
    try:
        status = module.run(arguments)  # type: ignore[attr-defined]
        print(end="", flush=True)  # while a failure can still be told
        return status
    except InlayError as error:
        if arguments.json:
            print(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
        print(f"inlay {arguments.command}: {error}", file=sys.stderr)
        return getattr(module, "ERROR_STATUS", 1)
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, Terminated)
        word = "terminated" if is_terminated else "interrupted"
        print(f"inlay {arguments.command}: {word}", file=sys.stderr)
        return 128 + (signal.SIGTERM if is_terminated else signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output is gone; keep the interpreter's last flush from failing too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        if not hasattr(module, "ERROR_STATUS"):
            raise
        traceback.print_exc()
        return int(module.ERROR_STATUS)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
