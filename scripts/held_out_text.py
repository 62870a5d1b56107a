"""Make `src/inlay/demo_model/heldout_c.txt.gz`: more text that the demo model has not read.

    python scripts/held_out_text.py      # half a minute

Training read docstrings in source files with `ast`; those of modules written in C lie in compiled
code, where it never looked. Here they are read with `inspect`, less those that the training text
repeats, word for word or lightly edited, by the rules of `train_demo.py`. `heldout.txt` stays as it
is. Run it with the Python that the README of the demo model names: another has other text.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from train_demo import OUTPUT, collect, is_copy, is_new, long_lines

NAME = "heldout_c.txt.gz"
SKIPPED = ("_test", "_xx", "xx", "antigravity", "this", "idlelib")
"""Modules that exist for Python's own tests, and those that do something when imported."""


def c_modules() -> Iterator[ModuleType]:
    for name in sorted({*sys.builtin_module_names, *sys.stdlib_module_names}):
        if name.startswith(SKIPPED):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # another platform's
        file = getattr(module, "__file__", None)
        if file is None or not file.endswith(".py"):
            yield module


def described(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of a module, its functions and classes, and their public members."""
    name = module.__name__
    yield f"module {name}", inspect.getdoc(module) or ""
    for key, thing in sorted(vars(module).items()):
        if key.startswith("_") or not callable(thing):
            continue
        yield heading(f"{name}.{key}", thing), inspect.getdoc(thing) or ""
        for inner, member in sorted(vars(thing).items()) if isinstance(thing, type) else ():
            if not inner.startswith("_") and not isinstance(member, str | int | tuple):
                text = inspect.getdoc(member) or ""
                yield heading(f"{name}.{key}.{inner}", member), text


def heading(name: str, thing: Any) -> str:
    signature = getattr(thing, "__text_signature__", None) or "(...)"
    return ("class " if isinstance(thing, type) else "") + name + signature


def held_out_text() -> str:
    seen: set[str] = set()
    seen_lines: set[str] = set()
    for document in (one for part in collect() for one in part):
        for entry in document.entries:
            seen.add(" ".join(entry.text.split()))
            seen_lines.update(long_lines(entry.text))
    texts = []
    for module in c_modules():
        entries = [
            f"{head}\n{textwrap.indent(text.strip(), '    ')}"
            for head, text in described(module)
            if is_new(text, seen) and not is_copy(text, seen_lines)
        ]
        if entries:
            texts.append("\n\n".join(entries))
    return "\n\n\n".join(texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT / NAME)
    data = held_out_text().encode()
    # Without a time in it, the same text is the same file.
    parser.parse_args().output.write_bytes(gzip.compress(data, 9, mtime=0))
    print(f"{len(data):,} bytes of text")


if __name__ == "__main__":
    main()
