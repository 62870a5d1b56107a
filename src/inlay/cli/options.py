"""Command line flags made from the option dataclasses: one source for CLI and Python."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields
from typing import Any

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_dataclass_arguments(parser: Flags, cls: type, skip: Any = ()) -> None:
    """One flag for each field, its help taken from the class's docstring."""
    texts = field_help(cls)
    for field in fields(cls):
        if field.name in skip:
            continue
        kind = _parser_of(str(field.type))
        default = None if field.default is MISSING else field.default
        flag = f"--{field.name.replace('_', '-')}"
        text = texts.get(field.name, "").replace("%", "%%")
        if kind is bool:
            # What is on already, or chosen by itself, needs a way to be turned off.
            switch = "store_true" if default is False else argparse.BooleanOptionalAction
            parser.add_argument(flag, action=switch, default=default, help=text)
        else:
            shown = "" if default is None else f" (default: {default})"
            parser.add_argument(
                flag, type=kind, default=default, metavar=kind.__name__, help=text + shown
            )


def dataclass_from_arguments(arguments: argparse.Namespace, cls: type, **fixed: Any) -> Any:
    """The dataclass again, validated by its own rules; fixed fields are not asked of the flags."""
    given = {f.name: getattr(arguments, f.name) for f in fields(cls) if hasattr(arguments, f.name)}
    return cls(**{**given, **fixed})


def field_help(cls: type) -> dict[str, str]:
    """`name: text` paragraphs of a docstring, by field."""
    names = {field.name for field in fields(cls)}
    texts: dict[str, str] = {}
    current = ""
    for line in (cls.__doc__ or "").splitlines():
        match = re.match(r"\s*(\w+): (.*)", line)
        if match and match[1] in names:
            current = match[1]
            texts[current] = match[2].strip()
        elif line.strip() and current:
            texts[current] += " " + line.strip()
        else:
            current = ""
    return texts


def _parser_of(annotation: str) -> Any:
    for name, kind in (("bool", bool), ("int", int), ("float", float)):
        if re.search(rf"\b{name}\b", annotation):
            return kind
    return str
