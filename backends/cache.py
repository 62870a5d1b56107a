"""Where compiled code is kept between runs: one file for each entry, named by key and content.

A file's name is `KEY-SHA256.suffix`: the key is a hash of all that the code was made from, the
other one that of its bytes. Whoever finds an entry hashes it, so a damaged one is never used, and
one `rename` makes it appear whole: any number of processes may build and read at once. What is
being written lies in `.build-*` directories that name their process; the next build or `inlay
cache clear` removes those of processes that are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inlay.backends.atomic import temporary_directory

logger = logging.getLogger(__name__)

BUILDING = ".build-"
"""Prefix of directories in which entries are made."""

FACTS = ".json"
"""Suffix of the file beside an entry that says where it came from; nothing relies on it."""

_held: dict[Path, int] = {}
"""Entries that this process uses where they lie, each with the descriptor that locks it."""


def cache_dir() -> Path:
    """INLAY_CACHE_DIR, else inlay under XDG_CACHE_HOME, else ~/.cache/inlay."""
    root = os.environ.get("INLAY_CACHE_DIR")
    if root:
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "inlay"


def content_key(identity: Mapping[str, Any]) -> str:
    """The key of what is made from these values alone."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


def fetch(place: Path, to: Path) -> bool:
    """Copy the entry of this place (see `keep`); False where there is none that is whole."""
    for path in _candidates(place):
        with contextlib.suppress(FileNotFoundError):  # removed just now: it is not there
            data = path.read_bytes()
            if _is_whole(path, data):
                to.write_bytes(data)
                os.utime(path)
                return True
    return False


def hold(place: Path) -> Path | None:
    """The entry of this place, whole, to be used where it lies; None where there is none.

    `inlay cache clear` leaves it alone as long as this process lives.
    """
    for path in _candidates(place):
        if path in _held and path.exists():
            return path
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink and _is_whole(path, path.read_bytes()):
                os.utime(path)
                _held[path] = descriptor
                return path
            os.close(descriptor)
    return None


def keep(file: Path, place: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Move a finished file of the same file system into the cache; returns its path there.

    place: `folder/KEY.suffix`; the content's hash is put between. facts: where it came from, for
    `inlay cache ls`.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    path = place.with_name(f"{place.stem}-{digest}{place.suffix}")
    if facts is not None:
        note = file.with_name(file.name + FACTS)
        note.write_text(json.dumps(dict(facts)))
        os.replace(note, path.with_suffix(FACTS))
    _sync(file)
    os.replace(file, path)
    _sync(path.parent)
    return path


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A directory in folder to make entries in, removed in the end or by the next build."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = temporary_directory(folder, BUILDING)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _candidates(place: Path) -> list[Path]:
    return sorted(place.parent.glob(f"{glob.escape(place.stem)}-*{place.suffix}"))


def _is_whole(path: Path, data: bytes) -> bool:
    if path.stem.rpartition("-")[2] == hashlib.sha256(data).hexdigest()[:16]:
        return True
    logger.warning("%s in the cache is damaged (its hash differs): it is made again", path)
    path.unlink(missing_ok=True)
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
