"""Directories that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from inlay.backends.artifact import MANIFEST
from inlay.errors import BuildError


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A temporary directory beside target that becomes target when the block ends well.

    On any error, an interrupt included, the temporary directory is removed and an artifact that
    stood at target is still there. Of two processes that write one target the last one wins.

    Raises:
        BuildError: target is something else than an artifact, or the disk is full or read-only.
    """
    target = target.resolve()  # a link stays, what it points to is replaced
    try:
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = temporary_directory(target.parent, f".{target.name}.tmp-")
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        yield directory
        _sync(directory)
        _swap(directory, target)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raises BuildError where writing would destroy or damage something that stands there."""
    target = target.resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise BuildError(
            f"output {target} is the working directory, which would be replaced; name a directory "
            "in it"
        )
    # Another process may be putting its artifact there just now: what stays foreign is foreign.
    if all(_is_foreign(target, delay) for delay in (0, 0.02, 0.05, 0.1)):
        raise BuildError(
            f"output {target} exists and is not an Inlay artifact; name a new directory, or "
            "remove it first"
        )
    for parent in target.parents:
        if (parent / MANIFEST).is_file():
            raise BuildError(
                f"output {target} lies inside the artifact {parent}, which would be damaged; name "
                "a directory outside of it"
            )


def _is_foreign(target: Path, delay: float) -> bool:
    time.sleep(delay)
    try:
        if not target.exists() or (target / MANIFEST).is_file():
            return False
        return not target.is_dir() or any(target.iterdir())
    except FileNotFoundError:
        return False


def temporary_directory(parent: Path, prefix: str) -> Path:
    """A fresh directory under parent; those that killed processes of this host left are removed."""
    mine = f"{prefix}{platform.node()}-"
    for path in parent.glob(f"{glob.escape(mine)}*"):
        pid = path.name[len(mine) :].split("-")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{mine}{os.getpid()}-", dir=parent))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cannot_write(target: Path, error: Exception) -> BuildError:
    free = ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        parent = next(p for p in (target, *target.parents) if p.exists())
        free = f" ({shutil.disk_usage(parent).free >> 20} MiB free on {parent})"
    return BuildError(
        f"could not write the artifact {target}{free}: {error}; nothing was left behind"
    )


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(directory: Path, target: Path) -> None:
    """Put directory in target's place; an old artifact there is moved aside first."""
    old = directory.with_name(directory.name + "-old")
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # one swap at a time: two would find each other's half
        check_target(target)
        if target.exists():
            target.rename(old)
        directory.rename(target)
        os.fsync(folder)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        os.close(folder)
        shutil.rmtree(old, ignore_errors=True)
