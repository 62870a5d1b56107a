"""The artifact on disk: what is damaged, foreign or of another machine is refused by name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inlay import Engine
from inlay.backends import artifact as module
from inlay.backends.artifact import (
    MANIFEST,
    Artifact,
    WeightReader,
    hash_files,
    write_manifest,
    write_weights,
)
from inlay.backends.eager.backend import EagerBackend
from inlay.engine import build
from inlay.errors import ArtifactError
from inlay.lowering.options import CompileOptions
from tests.runtime.toy_tokenizers import byte_level
from tests.toys import build_toy


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("artifact") / "engine"
    options = CompileOptions(backend="eager", dtype="float32", verify="capture")
    build(build_toy("llama"), path, options, tokenizer=byte_level())
    return path


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def refuse(path: Path, message: str, **options: bool) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        Engine.load(path, **options)
    assert str(path) in str(caught.value)


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at < 0 else at] ^= 1
    file.write_bytes(data)


def first(path: Path, pattern: str) -> Path:
    return sorted(path.glob(pattern))[0]


def test_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    options = CompileOptions(backend="eager", verify="capture")
    before = os.umask(0o027)
    try:
        path = build(build_toy("llama", layers=1), tmp_path / "engine", options).path
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()} == {
        0o640
    }


def test_a_file_that_may_not_be_read_is_named(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module, "file_sha256", refused)
    refuse(copied, r"cannot be read: .*Permission denied: .*; whoever runs it must be allowed")


# --- round trip ------------------------------------------------------------------------------


def test_it_says_what_it_is(original: Path) -> None:
    artifact = Artifact(original, check_weights=True)
    manifest = artifact.manifest
    assert (manifest["architecture"], manifest["backend"]) == ("llama", "eager")
    assert manifest["dtype"] == artifact.program.dtype == "float32"
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["limits"]["vocab_size"] == 128
    assert manifest["limits"]["max_seq_len"] == 256
    assert manifest["rebuild"] == (
        "inlay build MODEL -o DIR --backend eager --dtype float32 --verify capture"
    )
    config = artifact.json("model/config.json")
    assert (config["model_type"], config["hidden_size"]) == ("llama", 64)
    assert Engine(artifact).tokenizer().encode("a fox") == byte_level().encode("a fox")


def test_weights_are_those_of_the_model(original: Path) -> None:
    model = build_toy("llama")
    reader = WeightReader(Artifact(original))
    weights = dict(model.named_parameters())
    assert torch.equal(reader.get("lm_head.weight"), weights["lm_head.weight"])
    fused = reader.get("model.layers.1.mlp.gate_proj+up_proj.weight")
    parts = [weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(fused, torch.cat(parts))
    with pytest.raises(ArtifactError, match=r"weight 'magic' is not in .*index.json"):
        reader.get("magic")


def test_there_is_no_pickle_in_it(original: Path) -> None:
    kinds = {".json", ".safetensors", ".jinja"}
    for file in original.rglob("*"):
        if file.is_file():
            assert file.suffix in kinds, file
            head = file.read_bytes()[:4]
            assert head[:1] != b"\x80", f"{file} begins as a pickle does"
            assert head != b"PK\x03\x04", f"{file} is an archive"
            if file.suffix == ".json":
                json.loads(file.read_text())


# --- damage ----------------------------------------------------------------------------------

FILES = (
    "program.json",
    "recipe.json",
    "segments/*/graph.json",
    "weights/index.json",
    "model/config.json",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/generation_config.json",
)


@pytest.mark.parametrize("pattern", FILES)
def test_one_changed_bit(pattern: str, copied: Path) -> None:
    file = first(copied, pattern)
    flip(file)
    name = re.escape(str(file.relative_to(copied)))
    refuse(copied, f"is damaged: {name} has been changed: its sha256 differs; copy it again")


@pytest.mark.parametrize("pattern", [*FILES, "weights/*.safetensors"])
def test_a_truncated_or_missing_file(pattern: str, copied: Path) -> None:
    file = first(copied, pattern)
    size = file.stat().st_size
    name = re.escape(str(file.relative_to(copied)))
    file.write_bytes(file.read_bytes()[:-3])
    refuse(copied, rf"{name} has {size - 3} bytes instead of {size}.*rebuild: inlay build MODEL -o")
    file.unlink()
    refuse(copied, f"{name} is missing; copy it again")


@pytest.mark.parametrize("name", ["more", "segments/more.so", "model/.more", "weights/more/more"])
def test_a_file_that_is_not_of_it(name: str, copied: Path) -> None:
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("")
    refuse(copied, f"{re.escape(name)} is not of this artifact")


def test_changed_weights_are_found_on_request(copied: Path) -> None:
    flip(first(copied, "weights/*.safetensors"))
    Engine.load(copied)
    refuse(copied, r"weights/00000.safetensors has been changed: its sha256", check_weights=True)


def test_weights_whose_header_is_damaged(copied: Path) -> None:
    flip(first(copied, "weights/*.safetensors"), at=1)
    engine = Engine.load(copied)
    with pytest.raises(ArtifactError, match=r"weights file .*00000.safetensors is damaged: .*copy"):
        engine.load_model()


def edit(path: Path, change: Callable[[dict[str, Any]], Any], seal: bool = False) -> None:
    """Change the manifest; seal it again where another version might have written it so."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if seal:
        write_manifest(path, manifest)
    else:
        (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["limits"].update(max_seq_len=10**6),
        lambda manifest: manifest.update(backend="inductor"),
        lambda manifest: manifest["files"].popitem(),
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("limits"),
        lambda manifest: manifest.pop(module.SELF),
        lambda manifest: manifest.update(more=1),
    ],
)
def test_an_edited_manifest(change: Callable[[dict[str, Any]], Any], copied: Path) -> None:
    edit(copied, change)
    refuse(copied, r"is damaged: inlay.json has been changed: its sha256 differs; copy it again")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"inlay"', "{}", '{"format": "inlay"}', "\0"])
def test_a_manifest_that_is_none(text: str, copied: Path) -> None:
    (copied / MANIFEST).write_text(text)
    refuse(copied, r"inlay.json is damaged .*copy the artifact again, or rebuild: inlay build")
    (copied / MANIFEST).write_bytes(b"\xff\xfe")
    refuse(copied, r"inlay.json is damaged")


def test_every_truncation_of_the_manifest(copied: Path) -> None:
    text = (copied / MANIFEST).read_text()
    for length in range(0, len(text) - 2, 97):
        (copied / MANIFEST).write_text(text[:length])
        refuse(copied, "damaged")


@pytest.mark.parametrize("version", [0, 1, 3, "1", None])
def test_another_format_version(version: Any, copied: Path) -> None:
    edit(copied, lambda manifest: manifest.update(format_version=version))
    refuse(copied, f"version {version}, this Inlay reads inlay version 2; rebuild: inlay build")


def test_another_format(copied: Path) -> None:
    edit(copied, lambda manifest: manifest.update(format="onnx"))
    refuse(copied, "has format onnx version 2, this Inlay reads inlay version 2")


def test_places_that_hold_no_artifact(original: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", original / MANIFEST, original / "model"):
        refuse(place, "is not an Inlay artifact: it has no inlay.json; build one with `inlay build")


def test_a_program_that_this_version_does_not_know(copied: Path) -> None:
    (copied / "program.json").write_text('{"steps": [{"kind": "magic"}]}')
    edit(copied, lambda manifest: manifest.update(files=hash_files(copied)), seal=True)
    refuse(copied, r"program.json cannot be read \(KeyError\('magic'\)\)")


# --- weights ---------------------------------------------------------------------------------


def written(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, dict[str, str]]:
    folder.mkdir()
    write_weights(folder, tensors)
    return json.loads((folder / "weights" / "index.json").read_text())


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    options = CompileOptions(backend="eager", dtype="float32", verify="capture")
    sizes = {}
    for tied in (False, True):
        model = build_toy("llama", layers=1, tie_word_embeddings=tied)
        artifact = build(model, tmp_path / str(tied), options).artifact
        shards = artifact.path.glob("weights/*.safetensors")
        stored = {name for shard in shards for name in load_file(shard)}
        sizes[tied] = len(stored)
        assert len(stored) == len(artifact.program.weight_names)
        assert any("embed_tokens" in name or "lm_head" in name for name in stored)
    assert sizes[True] == sizes[False] - 1


def test_one_memory_under_two_names_is_written_once(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    again, turned = weight.view(8, 8), weight.t()
    index = written(
        tmp_path / "a",
        iter([("one", weight), ("two", again), ("turned", turned), ("b", weight[:4])]),
    )
    assert index["one"] == index["two"] == {"file": "00000.safetensors", "tensor": "one"}
    stored = load_file(tmp_path / "a" / "weights" / "00000.safetensors")
    assert sorted(stored) == ["b", "one", "turned"]
    assert torch.equal(stored["turned"], weight.t())
    assert torch.equal(stored["b"], weight[:4])


def test_memory_that_was_freed_and_used_again_is_another_weight(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(20):
            yield str(number), torch.full((1000,), float(number))

    index = written(tmp_path / "a", tensors())
    assert len({place["tensor"] for place in index.values()}) == 20
    stored = load_file(tmp_path / "a" / "weights" / "00000.safetensors")
    assert all((stored[str(number)] == number).all() for number in range(20))


def test_at_most_one_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 4000)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(12):
            tensor = torch.full((250,), float(number))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            yield str(number), tensor

    index = written(tmp_path / "a", tensors())
    assert sorted({place["file"] for place in index.values()}) == [
        "00000.safetensors",
        "00001.safetensors",
        "00002.safetensors",
    ]
    assert most <= 6, "four of a shard, the next one, and the one in hand"


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    small, large = torch.ones(5), torch.ones(1000)
    index = written(tmp_path / "a", iter([("a", small), ("b", large), ("c", small.clone())]))
    assert len({place["file"] for place in index.values()}) == 3


def test_a_moved_artifact_loads(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "ein anderer Ort"))
    moved = folder.rename(tmp_path / "moved")
    model = EagerBackend().load(Artifact(moved, check_weights=True))
    assert model.limits.max_seq_len == 256
