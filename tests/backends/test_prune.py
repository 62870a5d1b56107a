"""Pruned artifacts: weights gone, all else there, and refused wherever weights are needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay import LLM, Engine, compile_model
from inlay.backends.artifact import SELF, Artifact, WeightReader, tensor_sha256
from inlay.backends.prune import size_of
from inlay.errors import ArtifactError, BuildError, InlayError
from tests.runtime.toy_tokenizers import byte_level
from tests.test_engine import files_of_at_most
from tests.toys import build_toy


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = build_toy("llama", layers=1, tie_word_embeddings=True)
    return compile_model(model, "eager", tokenizer=byte_level(), verify="capture")


@pytest.fixture
def pruned(engine: Engine, tmp_path: Path) -> Engine:
    return engine.prune(tmp_path / "pruned")


def test_only_weights_go(engine: Engine, pruned: Engine) -> None:
    before, after = engine.manifest["files"], pruned.manifest["files"]
    gone = {name for name in before if name not in after}
    assert gone == {"weights/00000.safetensors"}
    assert all(after[name] == before[name] for name in after)
    assert size_of(pruned.artifact) < size_of(engine.artifact) - before[gone.pop()]["size"] + 1
    assert pruned.manifest["pruned"]["bytes"] == size_of(engine.artifact)
    assert pruned.manifest["provenance"][-1] == {"made_by": "prune", "of": engine.manifest[SELF]}
    assert pruned.artifact.is_pruned
    assert pruned.tokenizer().encode("a fox") == byte_level().encode("a fox")


def test_what_each_weight_was_is_kept(engine: Engine, pruned: Engine) -> None:
    reader, facts = WeightReader(engine.artifact), pruned.manifest["pruned"]["weights"]
    assert list(facts) == reader.names
    assert "lm_head.weight" in facts
    for name, fact in facts.items():
        tensor = reader.get(name)
        assert fact["shape"] == list(tensor.shape)
        assert fact["dtype"] == "float32"
        assert fact["sha256"] == tensor_sha256(tensor)


def test_the_hash_of_a_tensor_is_of_its_numbers() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    hashes = {
        tensor_sha256(tensor),
        tensor_sha256(tensor.t().contiguous().t()),  # the same, in another order in memory
        tensor_sha256(tensor.clone()),
    }
    assert len(hashes) == 1
    assert tensor_sha256(tensor + 1) not in hashes
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        assert len(tensor_sha256(tensor.to(dtype))) == 64
    assert len(tensor_sha256(torch.tensor(3.0))) == 64


@pytest.mark.parametrize("in_process", [True, False])
def test_it_is_not_run(in_process: bool, pruned: Engine) -> None:
    command = re.escape(f"inlay refit {pruned.path} --weights CHECKPOINT -o DIR")
    for model in (pruned, str(pruned.path)):
        with pytest.raises(ArtifactError, match=f"is pruned: it has no weights; .*{command}"):
            LLM(model, in_process=in_process)
    with pytest.raises(ArtifactError, match=command):
        pruned.load_model()
    with pytest.raises(ArtifactError, match=command):
        WeightReader(pruned.artifact)
    with pytest.raises(ArtifactError, match="is pruned already"):
        pruned.prune(pruned.path.parent / "more")


def test_it_is_copied_and_checked_as_others_are(pruned: Engine, tmp_path: Path) -> None:
    copied = pruned.save(tmp_path / "copy")
    assert Artifact(copied.path, check_weights=True).is_pruned
    (copied.path / "weights" / "00000.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"00000.safetensors is not of this artifact"):
        Engine.load(copied.path)


def test_in_place(engine: Engine, tmp_path: Path) -> None:
    copied = engine.save(tmp_path / "engine")
    copied.prune(tmp_path / "pruned").save(copied.path)
    assert Engine.load(copied.path).artifact.is_pruned
    made = Engine.load(copied.path).refit(
        build_toy("llama", layers=1, tie_word_embeddings=True), copied.path
    )
    assert not made.artifact.is_pruned
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "pruned"}


@pytest.mark.parametrize("what", ["prune", "refit"])
def test_a_full_disk(what: str, engine: Engine, tmp_path: Path) -> None:
    model = build_toy("llama", layers=1, tie_word_embeddings=True)
    with (
        pytest.raises(BuildError, match=r"could not write .*too large.*nothing was left behind"),
        files_of_at_most(3000),
    ):
        engine.prune(tmp_path / "x") if what == "prune" else engine.refit(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    return folder


def test_a_disk_that_is_really_full(engine: Engine, tiny_disk: Path) -> None:
    try:
        model = build_toy("llama", layers=1, vocab_size=2048)
        for build in (
            lambda: compile_model(model, "eager", verify="capture").save(tiny_disk / "x"),
            lambda: engine.save(tiny_disk / "a") and engine.save(tiny_disk / "b"),
        ):
            with pytest.raises(BuildError, match=r"MiB free on .*No space left on device"):
                build()
            assert not (tiny_disk / "x").exists()
            assert all(path.name == "a" for path in tiny_disk.iterdir())
    finally:
        subprocess.run(["umount", str(tiny_disk)], check=True)


KILLED = """
import os, signal, sys
from inlay import Engine
from inlay.backends import prune as pruning
from inlay.lowering import refit as refitting
from tests.toys import build_toy
def killed(*args):
    os.kill(os.getpid(), signal.SIGKILL)
pruning.write_manifest = refitting.write_weights = killed
engine = Engine.load(sys.argv[1])
if sys.argv[3] == "prune":
    engine.prune(sys.argv[2])
else:
    engine.refit(build_toy("llama", layers=1, tie_word_embeddings=True), sys.argv[2])
"""


@pytest.mark.parametrize("what", ["prune", "refit"])
def test_a_kill_leaves_no_half_artifact(what: str, engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(engine.path), str(target), what],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what the next one removes
    engine.prune(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_two_at_once_are_refused(engine: Engine, tmp_path: Path) -> None:
    from inlay.backends.atomic import claimed

    model = build_toy("llama", layers=1, tie_word_embeddings=True)
    with claimed(tmp_path / "x"):
        for start in (
            lambda: engine.prune(tmp_path / "x"),
            lambda: engine.refit(model, tmp_path / "x"),
            lambda: engine.save(tmp_path / "x"),
        ):
            with pytest.raises(InlayError, match=rf"written by process {os.getpid()} just now"):
                start()
    engine.prune(tmp_path / "x")


def test_an_artifact_is_not_pruned_in_its_own_place(engine: Engine) -> None:
    with pytest.raises(BuildError, match=r"is the artifact itself, which would lose its weights"):
        engine.prune(engine.path)
    assert (engine.path / "weights" / "00000.safetensors").is_file()


@pytest.mark.parametrize("name", ["weights/00000.safetensors", "constants.safetensors"])
def test_a_damaged_one_is_not_pruned(engine: Engine, tmp_path: Path, name: str) -> None:
    copy = Engine.load(shutil.copytree(engine.path, tmp_path / "copy"))
    file = copy.path / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # it may be a hard link
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} has been changed: its sha256 differs"):
        copy.prune(tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
