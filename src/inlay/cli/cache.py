"""`inlay cache ls | clear`: what is kept between builds, and its removal."""

from __future__ import annotations

import argparse
import json
from typing import Any

DAY = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from inlay.backends.cache_contents import KINDS

    parser.add_argument(
        "action", choices=("ls", "clear"), help="list entries, or remove those that are not in use"
    )
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="of this kind only; may be repeated"
    )
    parser.add_argument(
        "--older-than", type=_days, default=0.0, metavar="DAYS", help="unused for so many days only"
    )


def run(arguments: argparse.Namespace) -> int:
    from inlay.backends.cache import cache_dir
    from inlay.backends.cache_contents import KINDS, clear, list_entries

    chosen = arguments.kind or KINDS, arguments.older_than * DAY
    facts: dict[str, Any] = {"ok": True, "path": str(cache_dir())}
    if arguments.action == "ls":
        listed = {"entries": list_entries(*chosen)}
        facts["total_bytes"] = sum(entry.size for entry in listed["entries"])
    else:
        removed, kept = clear(*chosen)
        listed = {"removed": removed, "kept": kept}
        facts["freed_bytes"] = sum(entry.size for entry in removed)
    if arguments.json:
        rows = {name: [_facts(entry) for entry in entries] for name, entries in listed.items()}
        print(json.dumps({**facts, **rows}))
        return 0
    for entry in listed.get("kept", []):
        print(f"kept, in use by {entry.used_by}: {entry.kind}/{entry.name}")
    if arguments.action == "ls":
        for entry in listed["entries"]:
            print(_line(entry))
        print(f"{len(listed['entries'])} entries, {_size(facts['total_bytes'])} in {cache_dir()}")
    else:
        print(f"{len(removed)} entries removed, {_size(facts['freed_bytes'])} freed")
    return 0


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1.0
    if not days >= 0:  # NaN is no number of days
        raise argparse.ArgumentTypeError(f"must be a number of days, 0 or more, got {text}")
    return days


def _facts(entry: Any) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "size": entry.size,
        "age_s": round(entry.age, 1),
        "origin": entry.origin,
        "used_by": entry.used_by,
    }


def _line(entry: Any) -> str:
    use = f"in use by {entry.used_by}" if entry.used_by else f"unused for {_age(entry.age)}"
    return (
        f"{entry.kind:<8} {_size(entry.size):>9}  {use:<24} {entry.name}  {entry.origin}".rstrip()
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("days", DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
