"""The compile cache: whole entries only, whatever happens to those who write and read it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.backends.cache import building, content_key, fetch, hold, keep
from inlay.backends.cache_contents import clear, list_entries
from inlay.backends.inductor import backend as inductor
from inlay.backends.kernels import cpu_ops

COMPILE = """
import hashlib, os, sys, time
from pathlib import Path
from inlay.backends.cache import building, fetch, keep
place, to, tag, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
if fetch(place, to):
    print("cached", flush=True)
    sys.exit()
with building(place.parent) as scratch:
    file = scratch / "made"
    with file.open("w") as out:
        for number in range(2000):
            out.write(f"{tag} {number}\\n")
        out.flush()
        print("half", flush=True)
        time.sleep(pause)
        out.write("end\\n")
    keep(file, place, {"origin": "a model", "segment": tag})
assert fetch(place, to)
print("made", flush=True)
"""
"""Stands for a build: it takes what is cached, or slowly writes an entry."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The segments of a cache of this test's own."""
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "segments"


def put(place: Path, content: str, **facts: Any) -> Path:
    with building(place.parent) as scratch:
        (scratch / "file").write_text(content)
        return keep(scratch / "file", place, facts or None)


def start(place: Path, to: Path, tag: str, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMPILE, str(place), str(to), tag, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def taken(place: Path, to: Path) -> str | None:
    return to.read_text() if fetch(place, to) else None


def test_an_entry_is_taken_whole_and_under_its_key_alone(folder: Path, tmp_path: Path) -> None:
    assert taken(folder / "a.pt2", tmp_path / "to") is None
    put(folder / "a.pt2", "first")
    put(folder / "ab.pt2", "other")
    put(folder / "a.so", "library")
    assert taken(folder / "a.pt2", tmp_path / "to") == "first"
    assert taken(folder / "b.pt2", tmp_path / "to") is None
    digest = hashlib.sha256(b"first").hexdigest()[:16]
    assert (folder / f"a-{digest}.pt2").read_text() == "first"
    assert not list(folder.glob(".build-*"))


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"F" + d[1:], lambda d: b""])
@pytest.mark.parametrize("take", ["fetch", "hold"])
def test_a_damaged_entry_is_told_once_and_made_again(
    damage: Any, take: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = folder / "a.pt2"
    path = put(place, "first" * 100)
    path.write_bytes(damage(path.read_bytes()))
    assert not (fetch(place, tmp_path / "to") if take == "fetch" else hold(place))
    assert not (tmp_path / "to").exists()
    (record,) = caplog.records
    assert f"{path} in the cache is damaged" in record.getMessage()
    assert not path.exists()
    put(place, "first" * 100)
    assert taken(place, tmp_path / "to") == "first" * 100
    assert len(caplog.records) == 1


def test_processes_that_build_the_same_at_once(folder: Path, tmp_path: Path) -> None:
    place = folder / "a.pt2"
    running = [start(place, tmp_path / f"to{n}", f"build{n}", 0.3) for n in range(3)]
    said = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum(words[-1] == "made" for words in said) >= 1
    for number in range(3):
        lines = (tmp_path / f"to{number}").read_text().splitlines()
        assert len(lines) == 2001
        assert lines[-1] == "end"
        assert len({line.split()[0] for line in lines[:-1]}) == 1, "a mixture of two builds"
    assert not list(folder.glob(".build-*"))


def test_a_killed_build_leaves_nothing_that_is_trusted(folder: Path, tmp_path: Path) -> None:
    place = folder / "a.pt2"
    killed = start(place, tmp_path / "to", "killed", 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "half\n"
    (entry,) = list_entries()
    assert entry.used_by == f"process {killed.pid}"
    assert clear()[0] == [], "its directory was taken from a living process"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list(folder.iterdir())) == 1
    assert taken(place, tmp_path / "to") is None
    again = start(place, tmp_path / "to", "again")
    assert again.communicate(timeout=60)[0].split() == ["half", "made"]
    assert (tmp_path / "to").read_text().startswith("again 0\n")
    assert not list(folder.glob(".build-*")), "the next build removes what was left"


def test_clear_removes_what_a_killed_build_left(folder: Path, tmp_path: Path) -> None:
    killed = start(folder / "a.pt2", tmp_path / "to", "killed", 60)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.kill()
    killed.wait()
    removed, kept = clear()
    assert [entry.path.name[:7] for entry in removed] == [".build-"]
    assert not kept
    assert not list(folder.iterdir())


HOLD = """
import sys
from pathlib import Path
from inlay.backends.cache import hold
assert hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_process_holds_is_not_cleared(folder: Path) -> None:
    ops = folder.parent / "ops"
    path = put(ops / "lib.so", "code")
    free = put(ops / "other.so", "code")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ops / "lib.so")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    removed, kept = clear(["ops"])
    assert [entry.path for entry in removed] == [free]
    assert [(entry.path, entry.used_by) for entry in kept] == [(path, "a process")]
    holder.kill()
    holder.wait()
    assert [entry.path for entry in clear(["ops"])[0]] == [path]


def test_held_by_ourselves(folder: Path) -> None:
    path = put(folder / "mine.so", "code")
    assert hold(folder / "mine.so") == path
    assert hold(folder / "mine.so") == path
    assert not clear()[0]


def test_age_kind_and_origin(folder: Path, tmp_path: Path) -> None:
    old = put(folder / "old.pt2", "o" * 10, origin="demo", segment="first")
    new = put(folder / "new.pt2", "n" * 20)
    staging = folder.parent / "staging" / f"engine-{os.uname().nodename}-999999999-abc_1"
    staging.mkdir(parents=True)
    (staging / "file").write_bytes(b"x" * 1000)
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    entries = {entry.path: entry for entry in list_entries()}
    assert set(entries) == {old, new, staging}
    assert entries[old].origin == "demo: segment first"
    assert entries[new].origin == ""
    assert entries[old].size == 10
    assert entries[staging].size >= 1000
    assert [entry.path for entry in list_entries(["segments"], 2 * 86400)] == [old]
    assert fetch(folder / "old.pt2", tmp_path / "to"), "being used makes it young"
    assert not list_entries(["segments"], 2 * 86400)
    assert [entry.path for entry in clear(["staging"])[0]] == [staging]
    assert {entry.path for entry in clear()[0]} == {old, new}
    assert not list(folder.iterdir()), "a note about an entry outlived it"


def test_a_host_whose_processes_cannot_be_seen_is_left_alone(folder: Path) -> None:
    (folder.parent / "staging" / "engine-elsewhere-1-abc").mkdir(parents=True)
    removed, (kept,) = clear()
    assert not removed
    assert kept.used_by == "host elsewhere, perhaps"


# --- keys ------------------------------------------------------------------------------------


def key(monkeypatch: pytest.MonkeyPatch, level: int = 0) -> str:
    return content_key(inductor._toolchain(level))


def test_a_segments_key_has_all_that_changes_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = key(monkeypatch)
    assert key(monkeypatch) == before
    keys = {before, key(monkeypatch, level=1)}
    for target, name, value in (
        (torch, "__version__", "9.9"),
        (torch.version, "git_version", "0" * 40),
        (inductor, "INTERFACE", 99),
        (inductor, "_cpu_flags", lambda: ["avx1024"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(key(patch))
    # Not by monkeypatch: undoing deletes what config modules resolve dynamically.
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        keys.add(key(monkeypatch))
    compiler = tmp_path / "c++"
    for version in ("1", "2"):
        compiler.write_text(f"#!/bin/sh\necho version {version}\n")
        compiler.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(inductor, "get_cpp_compiler", lambda: str(compiler))
            keys.add(key(patch))
    sources = tmp_path / "source.py"
    sources.write_text("changed")
    with monkeypatch.context() as patch:
        patch.setattr(inductor.inspect, "getsourcefile", lambda of: str(sources))
        keys.add(key(patch))
    assert len(keys) == 10, "a change that the key does not show"
    assert key(monkeypatch) == before


def test_the_ops_key_has_flags_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def ops_key() -> str:
        return cpu_ops._build_hash(cpu_ops.find_compiler(), cpu_ops._units())

    keys = {ops_key()}
    for target, name, value in (
        (torch, "__version__", "9.9"),
        (cpu_ops, "_FLAGS", ("-O0",)),
        (cpu_ops, "INTERFACE", 99),
        (cpu_ops.platform, "machine", lambda: "aarch64"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            keys.add(ops_key())
    assert len(keys) == 5
