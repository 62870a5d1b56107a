"""Artifacts without their weights: to be kept or shipped where the weights are had otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from inlay.backends.artifact import (
    SELF,
    Artifact,
    WeightReader,
    hash_files,
    tensor_sha256,
    write_manifest,
)
from inlay.backends.atomic import claimed
from inlay.backends.select import get_backend
from inlay.errors import ArtifactError, BuildError


def prune(artifact: Artifact, target: Path) -> Path:
    """Write an artifact without what holds weights to target; returns it.

    Code, graphs, recipe, tokenizer and manifest stay. The manifest's "pruned" then says of each
    weight its shape, dtype and the sha256 of its numbers, and the bytes there were.

    Raises:
        ArtifactError: the artifact is pruned already, or its weights are damaged.
        BuildError: target is the artifact itself, cannot be written, or holds something else.
    """
    if artifact.is_pruned:
        raise ArtifactError(f"artifact {artifact.path} is pruned already; copy it, or refit it")
    if target.exists() and target.samefile(artifact.path):
        raise BuildError(
            f"output {target} is the artifact itself, which would lose its weights; name another "
            "directory"
        )
    artifact = Artifact(artifact.path, check_weights=True)
    with claimed(target) as claim:
        manifest, path = artifact.manifest, artifact.path
        left_out = set(files_with_weights(artifact.path, manifest["backend"]))
        facts = {"weights": weight_facts(path), "bytes": size_of(artifact)}
        with claim.filling() as directory:
            copy_without(path, directory, manifest["files"], left_out)
            write_manifest(
                directory,
                {
                    **manifest,
                    "pruned": facts,
                    "provenance": [
                        *manifest["provenance"],
                        {"made_by": "prune", "of": manifest[SELF]},
                    ],
                    "files": hash_files(directory),
                },
            )
    return target


def files_with_weights(directory: Path, backend: str) -> list[Path]:
    """The weights themselves, and a backend's files that hold them too."""
    weights = (directory / "weights").glob("*.safetensors")
    return [*weights, *get_backend(backend).weight_files(directory)]


def weight_facts(directory: Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype and sha256 of each weight, by name."""
    reader = WeightReader(directory)
    return {name: describe(reader.get(name)) for name in reader.names}


def describe(tensor: Any) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": tensor_sha256(tensor),
    }


def copy_without(source: Path, target: Path, names: Any, left_out: set[Path]) -> None:
    """Copy these files of a directory, but those that are left out."""
    for name in names:
        if source / name not in left_out:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def size_of(artifact: Artifact) -> int:
    """Bytes of all files that the manifest lists."""
    return sum(facts["size"] for facts in artifact.manifest["files"].values())
