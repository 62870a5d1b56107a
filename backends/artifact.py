"""The engine on disk: a directory that can be checked, moved and loaded without tracing.

    inlay.json                      manifest: what this is, what it was built for, sha256 of files
    program.json                    the steps (see program.py)
    recipe.json                     how the weights were made of the checkpoint's
    graph.json                      the whole graph before quantization and cutting, for `refit`
    constants.safetensors           tensors of that graph that are no weights of a checkpoint
    segments/KEY/graph.json         each distinct segment as our own JSON; runs anywhere (eager)
    segments/KEY/...                what the backend compiled of it
    weights/NNNNN.safetensors       memory-mapped; weights/index.json says where each name lies
    model/...                       config, generation config, tokenizer, chat template
    eval.json                       what `inlay eval` found, if it was run; not in the manifest

A pruned artifact has no weights/*.safetensors; its manifest's "pruned" has what each weight was.

There is no pickle in it. Hashes detect damage, not tampering: loading an artifact runs the code
it holds, so load only those you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from inlay.backends.program import Program
from inlay.errors import ArtifactError

FORMAT_VERSION = 2
MANIFEST = "inlay.json"
SELF = "manifest_sha256"
EVALUATIONS = "eval.json"
"""Verdicts that come after the build: with their own hash and that of the manifest they are about.
Files that begin with this name are no part of the artifact: such is one that is being written."""
REBUILD = "inlay build MODEL -o DIR"
GRAPH = "graph.json"
CONSTANTS = "constants.safetensors"
SHARD_BYTES = 128 << 20
"""Small shards: packing weights at load maps one shard at a time."""


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """A safetensors file with the rights of any other new file: the library lets its user alone
    read it."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path)
    path.chmod(mode)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_weights(name: str) -> bool:
    """Whether this file of an artifact holds weights; they are hashed on request only."""
    return name.startswith("weights/") and name.endswith(".safetensors")


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Of the numbers' bytes, row by row."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).hexdigest()


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


# --- writing ---------------------------------------------------------------------------------


def write_weights(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stream tensors into shards; one that was already written under another name (a tied
    embedding) is not written again. Peak memory is one shard."""
    folder = directory / "weights"
    folder.mkdir()
    index: dict[str, dict[str, str]] = {}
    # Memory is known by its address only while the tensor that was there lives.
    written: dict[tuple[Any, ...], tuple[weakref.ref[torch.Tensor], dict[str, str]]] = {}
    shard: dict[str, torch.Tensor] = {}
    storages: set[int] = set()  # of the shard: safetensors refuses two tensors over one memory
    size = number = 0

    def flush() -> None:
        nonlocal size, number
        if shard:
            save_tensors(shard, folder / f"{number:05d}.safetensors")
            shard.clear()
            storages.clear()
            size, number = 0, number + 1

    for name, tensor in tensors:
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if identity in written and written[identity][0]() is not None:
            index[name] = written[identity][1]
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        if size and size + num_bytes > SHARD_BYTES:
            flush()
        is_view = tensor.untyped_storage().data_ptr() in storages
        shard[name] = tensor.contiguous().clone() if is_view else tensor.contiguous()
        storages.add(shard[name].untyped_storage().data_ptr())
        size += num_bytes
        index[name] = {"file": f"{number:05d}.safetensors", "tensor": name}
        written[identity] = (weakref.ref(tensor), index[name])
    flush()
    write_json(folder / "index.json", index)


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but the manifest and verdicts, by its path in the directory."""
    return {
        str(path.relative_to(directory)): {
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path != directory / MANIFEST
        and not path.relative_to(directory).as_posix().startswith(EVALUATIONS)
    }


def weights_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of all weight files, of what `hash_files` gives."""
    hashes = [files[name]["sha256"] for name in sorted(files) if name.startswith("weights/")]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """The manifest, last of all, with a hash of itself."""
    header = {"format": "inlay", "format_version": FORMAT_VERSION}
    content = {**header, **manifest}
    write_json(directory / MANIFEST, {**content, SELF: _content_sha256(content)})


def _content_sha256(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != SELF}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- reading ---------------------------------------------------------------------------------


class Artifact:
    """An artifact opened for reading, its format, sizes and hashes checked.

    check_weights: hash the weight files too (seconds per GB); code and graphs always are.

    Raises:
        ArtifactError: not an artifact, another format version, a file missing, unreadable,
            truncated, edited or added; the message names the file and the command that rebuilds it.
    """

    def __init__(self, path: str | os.PathLike[str], check_weights: bool = False) -> None:
        self.path = Path(path)
        try:
            self.manifest = self._read_manifest()
            self._check_files(check_weights)
            self.program = self._parse("program.json", Program.from_json)
            self.recipes: dict[str, Any] = self._parse("recipe.json", dict)
        except OSError as error:
            raise ArtifactError(
                f"artifact {self.path} cannot be read: {error}; whoever runs it must be allowed to "
                "read all of its files"
            ) from error

    def _read_manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        if not file.is_file():
            raise ArtifactError(
                f"{self.path} is not an Inlay artifact: it has no {MANIFEST}; build one with "
                f"`{REBUILD}`"
            )
        try:
            manifest = json.loads(file.read_text())
            version, kind = manifest["format_version"], manifest["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{file} is damaged ({error!r}); copy the artifact again, or rebuild: {REBUILD}"
            ) from None
        rebuild = manifest.get("rebuild", REBUILD)
        if kind != "inlay" or version != FORMAT_VERSION:
            raise ArtifactError(
                f"{self.path} has format {kind} version {version}, this Inlay reads inlay version "
                f"{FORMAT_VERSION}; rebuild: {rebuild}"
            )
        if manifest.get(SELF) != _content_sha256(manifest):
            raise ArtifactError(
                f"artifact {self.path} is damaged: {MANIFEST} has been changed: its sha256 "
                f"differs; copy it again, or rebuild: {rebuild}"
            )
        return manifest

    @property
    def is_pruned(self) -> bool:
        """Whether the weights were taken out."""
        return "pruned" in self.manifest

    def check_complete(self) -> None:
        """Raises ArtifactError where there are no weights to run with."""
        if self.is_pruned:
            raise ArtifactError(
                f"artifact {self.path} is pruned: it has no weights; give it some with `inlay "
                f"refit {shlex.quote(str(self.path))} --weights CHECKPOINT -o DIR`, made of "
                f"{self.manifest['origin']}"
            )

    def _check_files(self, check_weights: bool) -> None:
        expected = self.manifest["files"]
        present = {str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()}
        for name in sorted(present - {MANIFEST, *expected}):
            if not name.startswith(EVALUATIONS):
                raise self._damaged(name, "is not of this artifact")
        for name, facts in expected.items():
            file = self.path / name
            if name not in present:
                raise self._damaged(name, "is missing")
            if (size := file.stat().st_size) != facts["size"]:
                raise self._damaged(name, f"has {size} bytes instead of {facts['size']}")
            if (check_weights or not is_weights(name)) and file_sha256(file) != facts["sha256"]:
                raise self._damaged(name, "has been changed: its sha256 differs")

    def _damaged(self, name: str, what: str) -> ArtifactError:
        return ArtifactError(
            f"artifact {self.path} is damaged: {name} {what}; copy it again, or rebuild: "
            f"{self.manifest['rebuild']}"
        )

    def _parse(self, name: str, parse: Any) -> Any:
        try:
            return parse(self.json(name))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(name, f"cannot be read ({error!r})") from None

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def segment_file(self, key: str, name: str) -> Path:
        return self.path / "segments" / key / name

    @property
    def model_dir(self) -> Path:
        """Config, generation config, tokenizer and chat template, as transformers saves them."""
        return self.path / "model"


class WeightReader:
    """Weights of an artifact by name, one shard mapped at a time.

    artifact: or its directory, where it is being written. Raises ArtifactError for a pruned one.

    A tensor that is to outlive the next shard must be cloned by the caller: `get` returns a view
    of the mapped file.
    """

    def __init__(self, artifact: Artifact | Path) -> None:
        if isinstance(artifact, Artifact):
            artifact.check_complete()
            artifact = artifact.path
        self._folder = artifact / "weights"
        self._index: dict[str, dict[str, str]] = json.loads(
            (self._folder / "index.json").read_text()
        )
        self._name = ""
        self._file: Any = None

    @property
    def names(self) -> list[str]:
        """In the order in which they lie in the files."""
        return list(self._index)

    def get(self, name: str) -> torch.Tensor:
        """Raises ArtifactError where the file cannot be read or lacks the tensor."""
        place = self._index.get(name)
        if place is None:
            raise ArtifactError(f"weight {name!r} is not in {self._folder / 'index.json'}")
        try:
            if place["file"] != self._name:
                self._file = safe_open(self._folder / place["file"], framework="pt")
                self._name = place["file"]
            return self._file.get_tensor(place["tensor"])
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"weights file {self._folder / place['file']} is damaged: {error}; copy the "
                "artifact again or rebuild it"
            ) from None
