"""What lies in the cache, and how to remove it without taking it from a process that uses it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inlay.backends.atomic import is_alive
from inlay.backends.cache import BUILDING, FACTS, cache_dir

KINDS = ("segments", "ops", "staging", "references", "tensorrt")
"""Compiled segments, libraries of C++ ops, engines that were compiled but not yet saved, and what
Hugging Face gave for the texts of `inlay eval`; of TensorRT, kernels compiled for this machine's
GPUs and which engines were right on them."""

_OWNED = re.compile(rf"(?:{re.escape(BUILDING)}|engine-)(?P<host>.+)-(?P<pid>\d+)-[^-]+")
"""Directories named by `temporary_directory`."""


@dataclass(frozen=True)
class Entry:
    """kind: of KINDS. size: in bytes, with all it holds. age: seconds since it was last used.
    origin: what it was made for, where that is known. used_by: who uses it now, or "".
    """

    kind: str
    path: Path
    size: int
    age: float
    origin: str
    used_by: str

    @property
    def name(self) -> str:
        return self.path.name


def list_entries(kinds: Sequence[str] = KINDS, older_than: float = 0) -> list[Entry]:
    """Entries of these kinds that nobody has used for so many seconds, the latest first."""
    entries = [entry for kind in kinds for entry in _entries(kind) if entry.age >= older_than]
    return sorted(entries, key=lambda entry: (KINDS.index(entry.kind), entry.age))


def clear(kinds: Sequence[str] = KINDS, older_than: float = 0) -> tuple[list[Entry], list[Entry]]:
    """Remove such entries, leftovers of killed processes included: (removed, kept as in use)."""
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry in list_entries(kinds, older_than):
        (kept if entry.used_by or not _remove(entry.path) else removed).append(entry)
    return removed, kept


def _entries(kind: str) -> Iterator[Entry]:
    folder, now = cache_dir() / kind, time.time()
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix == FACTS and any(folder.glob(f"{path.stem}.[!j]*")):
            continue  # beside its entry
        try:
            files = [path, *path.rglob("*")] if path.is_dir() else [path]
            facts = [one.lstat() for one in files]
        except FileNotFoundError:  # removed by its owner meanwhile
            continue
        size = sum(fact.st_size for fact in facts)
        age = max(now - max(fact.st_mtime for fact in facts), 0)
        yield Entry(kind, path, size, age, _origin(path), _used_by(path))


def _origin(path: Path) -> str:
    if path.name.startswith(BUILDING):
        return "being built" if _used_by(path) else "left by a build that was killed"
    try:
        facts = json.loads(path.with_suffix(FACTS).read_text())
        return f"{facts['origin']}: {facts.get('what') or 'segment ' + facts['segment']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _used_by(path: Path) -> str:
    """A living process that uses an entry, or a host whose processes cannot be seen from here."""
    if owned := _OWNED.fullmatch(path.name):
        if owned["host"] != platform.node():
            return f"host {owned['host']}, perhaps"
        return f"process {owned['pid']}" if is_alive(int(owned["pid"])) else ""
    if path.is_dir():
        return ""
    with _locked(path) as mine:
        return "" if mine else "a process"


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return not path.exists()
    with _locked(path) as mine:
        if mine:
            path.unlink(missing_ok=True)
            path.with_suffix(FACTS).unlink(missing_ok=True)
        return mine


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody holds this file (see `cache.hold`); nobody can as long as the block runs."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)
