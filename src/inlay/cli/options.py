"""Command line flags made from the option dataclasses: one source for CLI and Python."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from inlay.errors import OptionError

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


def read_config(file: str, allowed: Sequence[str], texts: Collection[str]) -> dict[str, Any]:
    """A YAML file's entries; their values are checked by who takes them, but those in texts.

    Raises OptionError for a file that cannot be read, a name that is not allowed or comes twice,
    and one of texts that is no text.
    """
    import yaml

    try:
        content = Path(file).read_text(encoding="utf-8")
        tree = yaml.compose(content, Loader=yaml.SafeLoader)
        data = yaml.safe_load(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"config {file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise OptionError(f"config {file} must be a mapping of names to values, got {data!r}")
    for name in data:
        if name not in allowed:
            raise OptionError(f"config {file}: unknown {name!r}; names are {', '.join(allowed)}")
    for name, count in _names(tree).items():
        if count > 1:
            raise OptionError(f"config {file}: {name} is there {count} times; keep one")
    for name in texts:
        if name in data and not isinstance(data[name], str):
            raise OptionError(f"config {file}: {name} must be a text, got {data[name]!r}")
    return data


def _names(node: Any, above: str = "") -> Counter[str]:
    """How often each name is in the YAML mapping that holds it, those of mappings within too."""
    found: Counter[str] = Counter()
    for place, entry in enumerate(node.value if isinstance(node.value, list) else ()):
        if isinstance(entry, tuple):
            name = f"{above}{entry[0].value}"
            found += Counter([name]) + _names(entry[1], f"{name}.")
        else:
            found += _names(entry, f"{above}{place}.")
    return found


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
