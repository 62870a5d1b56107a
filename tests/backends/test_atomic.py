"""Directories appear whole or not at all: errors, interrupts, kills, full disks, two at once."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inlay.backends.artifact import MANIFEST
from inlay.backends.atomic import check_target, claimed, temporary_directory, writing
from inlay.errors import BuildError


def write(target: Path, text: str = "new") -> None:
    with writing(target) as directory:
        (directory / MANIFEST).write_text(text)
        (directory / "folder").mkdir()
        (directory / "folder" / "file").write_text(text)


def write_half(target: Path, error: BaseException) -> None:
    with writing(target) as directory:
        (directory / MANIFEST).write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def content(target: Path) -> str:
    assert names(target) == ["folder", MANIFEST]
    assert (target / MANIFEST).read_text() == (target / "folder" / "file").read_text()
    return (target / MANIFEST).read_text()


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk, in whatever library it happens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_directory_appears_and_replaces_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "engine"
    write(target, "old")
    assert content(target) == "old"
    write(target)
    assert content(target) == "new"
    assert names(target.parent) == ["engine"]


def test_an_empty_directory_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    write(tmp_path / "engine")
    assert content(tmp_path / "engine") == "new"


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path: Path) -> None:
    for length in (200, 210, 220, 230, 240, 255, 300):
        target, failure = tmp_path / ("x" * length), ""
        try:
            write(target)
        except BuildError as error:
            failure = str(error)
        assert names(tmp_path) == ([] if failure else [target.name])
        assert bool(failure) == ("too long" in failure)
        shutil.rmtree(target, ignore_errors=True)
    assert failure, "names of 300 characters are not possible"


@pytest.mark.parametrize("name", ["[a]", "*", "ein Modell", ".hidden"])
def test_odd_names(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "old")
    write(tmp_path / name)
    assert content(tmp_path / name) == "new"
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no"), SystemExit(3)])
def test_an_error_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    for expected in ([], ["engine"]):
        with pytest.raises(type(error)):
            write_half(tmp_path / "engine", error)
        assert names(tmp_path) == expected
        write(tmp_path / "engine", "old")
    assert content(tmp_path / "engine") == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupt_while_the_directories_change_places(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "engine", "old")
    rename, number = Path.rename, 0

    def interrupted(self: Path, to: Path) -> Path:
        nonlocal number
        number += 1
        if number == failing:
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]
    assert content(tmp_path / "engine") == "old"


def test_a_full_disk(tmp_path: Path) -> None:
    write(tmp_path / "engine", "old")
    tensors = {"weight": torch.zeros(100_000)}
    for save in (
        lambda directory: save_file(tensors, directory / "weights.safetensors"),
        lambda directory: (directory / "file").write_bytes(bytes(400_000)),
    ):
        with (
            pytest.raises(BuildError, match=r"could not write the artifact .*/engine: .*too large"),
            files_of_at_most(100_000),
            writing(tmp_path / "engine") as directory,
        ):
            save(directory)
        assert names(tmp_path) == ["engine"]
        assert content(tmp_path / "engine") == "old"


def test_a_full_disk_is_told_with_the_room_there_is(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(BuildError, match=rf"\(\d+ MiB free on {tmp_path}\): .*No space left"),
        writing(tmp_path / "engine"),
    ):
        raise full
    assert names(tmp_path) == []


def test_what_must_not_be_replaced(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for target in (file, folder, tmp_path):
        with pytest.raises(BuildError, match=f"output {target} exists and is not an Inlay"):
            write(target)
        with pytest.raises(BuildError, match="name a new directory, or remove it first"):
            check_target(target)
    with pytest.raises(BuildError, match=f"could not write the artifact {file}/engine: "):
        write(file / "engine")
    assert names(tmp_path) == ["file", "folder"]
    assert names(folder) == ["mine"]


def test_the_working_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path("."), tmp_path, tmp_path.parent, Path("/")):
        with pytest.raises(BuildError, match=r"is the working directory.*name a directory in it"):
            write(target)
    write(Path("engine"))
    assert content(tmp_path / "engine") == "new"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    write(tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert content(tmp_path / "v1") == "new"
    assert names(tmp_path) == ["current", "v1"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "engine"

    def run() -> None:
        with writing(target) as directory:
            (directory / MANIFEST).write_text("new")
            target.mkdir()
            (target / "mine").write_text("mine")

    with pytest.raises(BuildError, match="exists and is not an Inlay artifact"):
        run()
    assert names(tmp_path) == ["engine"]
    assert names(target) == ["mine"]


def test_an_artifact_is_not_written_into_another(tmp_path: Path) -> None:
    write(tmp_path / "engine")
    with pytest.raises(BuildError, match=f"inside the artifact {tmp_path}/engine, which would be"):
        write(tmp_path / "engine" / "folder" / "other")
    assert content(tmp_path / "engine") == "new"


def test_a_place_that_cannot_be_written() -> None:
    # Root may write everywhere but here.
    with pytest.raises(BuildError, match="could not write the artifact /proc/engine: "):
        write(Path("/proc/engine"))


KILLED = """
import os, signal, sys
from pathlib import Path
from inlay.backends.atomic import temporary_directory, writing
temporary_directory(Path(sys.argv[1]), "engine-")
with writing(Path(sys.argv[1]) / "engine") as directory:
    (directory / "file").write_text("half")
    print(directory.parent.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_one_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    (tmp_path / ".engine.tmp-elsewhere-1-abc").mkdir()  # of another host: perhaps in use
    (tmp_path / "engine-notes").mkdir()
    left = names(tmp_path)
    assert len(left) == 4
    assert done.stdout.strip() in left
    write(tmp_path / "engine")
    kept = temporary_directory(tmp_path, "engine-")
    expected = [".engine.tmp-elsewhere-1-abc", "engine", "engine-notes", kept.name]
    assert names(tmp_path) == sorted(expected)
    # Ours lives as long as we do.
    assert temporary_directory(tmp_path, "engine-") != kept
    assert kept.is_dir()


def test_many_writers_of_one_target(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    written: list[str] = []

    def run(number: int) -> None:
        for turn in range(20):
            try:
                write(tmp_path / "engine", f"{number}-{turn}")
                written.append(f"{number}-{turn}")
            except BuildError as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is being written by process" in str(error) for error in errors)
    assert len(written) + len(errors) == 80
    assert content(tmp_path / "engine") in written
    assert names(tmp_path) == ["engine"]


# --- one writer at a time ----------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from inlay.backends.atomic import claimed
with claimed(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    write(target, "old")
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(target)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mine\n"
        message = f"output {target} is being written by process {other.pid} just now; wait for it"
        with pytest.raises(BuildError, match=message):
            write(target)
        write(tmp_path / "elsewhere")
    finally:
        other.kill()
        other.wait()
    write(target)
    assert content(target) == "new"
    assert names(tmp_path) == ["elsewhere", "engine"]


def test_a_claim_ends_with_its_block(tmp_path: Path) -> None:
    target = tmp_path / "engine"

    def fail() -> None:
        with claimed(target):
            with pytest.raises(BuildError, match=f"written by process {os.getpid()} just now"):
                write(target)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert names(tmp_path) == []
    write(target)
    assert content(target) == "new"


def test_a_number_that_another_process_has_now_is_no_trap(tmp_path: Path) -> None:
    """What a killed process left under a process id that lives, this one's, is not believed."""
    host = platform.node()
    left = tmp_path / f".engine.tmp-{host}-{os.getpid()}-abc"
    left.mkdir()
    (left / "file").write_text("half")
    write(tmp_path / "engine")
    assert names(tmp_path) == ["engine"]


def test_an_artifact_that_was_moved_aside_when_its_process_died(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    write(target, "old")
    half = tmp_path / f".engine.tmp-{platform.node()}-1-abc"
    half.mkdir()
    target.rename(tmp_path / f"{half.name}-old")
    with claimed(target):
        assert content(target) == "old"
    assert names(tmp_path) == ["engine"]


def test_a_process_of_another_host_is_seen_too(tmp_path: Path) -> None:
    """Two containers may share a directory: a lock is held or it is not, wherever."""
    target = tmp_path / "engine"
    left = tmp_path / ".engine.tmp-other-host-1-abc"
    left.mkdir()
    lock = os.open(left, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(BuildError, match=r"is being written by process 1 just now"):
        write(target)
    os.close(lock)
    write(target)
    assert names(tmp_path) == [left.name, "engine"]  # that host may not show us its locks


def test_a_target_whose_name_begins_with_anothers(tmp_path: Path) -> None:
    with claimed(tmp_path / "engine.tmp-b"), claimed(tmp_path / "engine"):
        assert len(names(tmp_path)) == 2
    other = tmp_path / ".engine.tmp-b.tmp-host-1-abc"
    other.mkdir()
    write(tmp_path / "engine")
    assert names(tmp_path) == [other.name, "engine"]


def test_one_written_inside_of_another_that_is_being_written(tmp_path: Path) -> None:
    with writing(tmp_path / "outer") as outer:
        with writing(outer / "inner") as inner:
            (inner / MANIFEST).write_text("{}")
        (outer / MANIFEST).write_text("{}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["outer", "inner", MANIFEST, MANIFEST]
    )
