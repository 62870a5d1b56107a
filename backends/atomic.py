"""Directories that appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from inlay.backends.artifact import MANIFEST
from inlay.errors import BuildError

ASIDE = "-old"
"""Of the name of an artifact that is being replaced."""


class Claim:
    """A place for an artifact that nobody else writes to: made by `claimed`."""

    def __init__(self, target: Path, directory: Path) -> None:
        self.target, self._directory = target, directory

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """A temporary directory beside the target that becomes it when the block ends well.

        Raises BuildError where the disk is full or read-only, or something else stands there now.
        """
        try:
            self._directory.mkdir()
            yield self._directory
            _sync(self._directory)
            _swap(self._directory, self.target)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(self.target, error) from error


@contextmanager
def claimed(target: Path) -> Iterator[Claim]:
    """Keep a target for this block alone, from before the work that is to fill it.

    On any error, an interrupt included, the temporary directory is removed and an artifact that
    stood at target is still there. The claim is a lock on the directory around it,
    which the system gives up when the process dies, however it does; the next one removes what a
    dead process left.

    Raises:
        BuildError: target is something else than an artifact, cannot be written, or is being
            written by another process or thread.
    """
    target = target.resolve()  # a link stays, what it points to is replaced
    try:
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        own, lock = _take(target)
    except OSError as error:
        raise _cannot_write(target, error) from error
    try:
        directory = own / target.name  # not `own`: its lock would stop who writes inside of it
        yield Claim(target, directory)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(lock)


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """`claimed` and `filling` at once: for what is written without long work before it."""
    with claimed(target) as claim, claim.filling() as directory:
        yield directory


def _take(target: Path) -> tuple[Path, int]:
    """A locked temporary directory of this target, and the lock's descriptor."""
    begin = f".{target.name}.tmp-"
    of_target = re.compile(rf"{re.escape(begin)}(?!.*\.tmp-)(.*)-(\d+)-\w+?({ASIDE})?")
    with _locked(target.parent):  # nobody takes a directory for dead that is not locked yet
        for path in target.parent.glob(f"{glob.escape(begin)}*"):
            named = of_target.fullmatch(path.name)
            if named is None:  # of a target that has this one's name in its own
                continue
            host, pid, _ = named.groups()
            is_ours = host == platform.node()
            if is_ours and path.name.endswith(ASIDE) and not target.exists():
                path.rename(target)  # the process died between the two renames of _swap
                continue
            if _is_locked(path):
                raise BuildError(
                    f"output {target} is being written by process {pid} just now; wait for it "
                    "to end, or name another directory"
                )
            if is_ours:  # not every file system shows locks of other hosts
                shutil.rmtree(path, ignore_errors=True)
        prefix = f"{begin}{platform.node()}-{os.getpid()}-"
        longest = f"{prefix}{'x' * 8}{ASIDE}"
        if len(os.fsencode(longest)) > os.pathconf(target.parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), longest)
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        lock = os.open(directory, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return directory, lock


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # its owner has just ended
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """One process at a time makes, judges and moves directories here; gives the descriptor."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


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
    old = target.with_name(directory.parent.name + ASIDE)
    try:
        with _locked(target.parent) as folder:
            check_target(target)
            try:
                if target.exists():
                    target.rename(old)
                directory.rename(target)
                os.fsync(folder)
            finally:
                if old.exists() and not target.exists():
                    old.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)
