"""`compile_model`, and the handle on what it made."""

from __future__ import annotations

import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlay.backends.artifact import MANIFEST, Artifact
from inlay.backends.atomic import temporary_directory, writing
from inlay.backends.base import LoadedModel
from inlay.backends.cache import cache_dir
from inlay.backends.prune import prune
from inlay.backends.select import get_backend
from inlay.errors import ArtifactError, BuildError, OptionError
from inlay.lowering.loading import load_tokenizer
from inlay.lowering.options import CompileOptions
from inlay.lowering.pipeline import lower
from inlay.lowering.refit import refit

logger = logging.getLogger(__name__)

PORTABLE = "eager"
"""The backend that runs the graphs of any artifact, whatever else they were compiled for."""


class Engine:
    """A compiled model on disk. `compile_model` makes one; `Engine.load` opens a saved one."""

    def __init__(self, artifact: Artifact, backend: str | None = None) -> None:
        self.artifact = artifact
        built = artifact.manifest["backend"]
        self.backend = backend or built
        get_backend(self.backend)
        if self.backend not in (built, PORTABLE):
            raise OptionError(
                f"backend must be one of {', '.join({built: 1, PORTABLE: 1})} for the artifact "
                f"{artifact.path}, got {backend!r}; build another with `inlay build`"
            )

    @staticmethod
    def load(
        path: str | os.PathLike[str], *, backend: str | None = None, check_weights: bool = False
    ) -> Engine:
        """Open an artifact directory.

        backend: None for the one it was built for, or "eager" to interpret its graphs without
            compiled code. check_weights: also hash the weight files; the rest always is.

        Raises:
            ArtifactError: the directory is no artifact, damaged, or of another format version.
            OptionError: the artifact was not built for this backend.
        """
        return Engine(Artifact(path, check_weights), backend)

    def load_model(self) -> LoadedModel:
        """Load code and weights; raises ArtifactError where they do not fit this machine, or were
        pruned."""
        self._check_present()
        self.artifact.check_complete()
        return get_backend(self.backend).load(self.artifact)

    def tokenizer(self) -> Any:
        """The model's tokenizer, None where it has none."""
        self._check_present()
        trusted = self.manifest["options"].get("trust_remote_code", False)
        return load_tokenizer(self.artifact.model_dir, trusted)

    def _check_present(self) -> None:
        if not (self.path / MANIFEST).is_file():
            raise ArtifactError(
                f"artifact {self.path} is gone: it was moved or removed since it was opened; open "
                "it where it is now with Engine.load"
            )

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def manifest(self) -> dict[str, Any]:
        """What the engine is and was built for: see the artifact's inlay.json."""
        return self.artifact.manifest

    @property
    def is_encoder(self) -> bool:
        """Whether the model gives hidden states of whole requests rather than next tokens."""
        return self.artifact.program.is_encoder

    @property
    def model_config(self) -> dict[str, Any]:
        """The model's Hugging Face config."""
        return self.artifact.json("model/config.json")

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's Hugging Face generation config; {} where it has none."""
        file = self.artifact.model_dir / "generation_config.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def pooling_config(self) -> dict[str, Any]:
        """The checkpoint's 1_Pooling/config.json of sentence-transformers; {} where it has none."""
        file = self.artifact.model_dir / "pooling.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """What `inlay eval` found about this artifact, oldest first: `Evaluation.to_json` each."""
        from inlay.eval.store import read

        return read(self)

    def save(self, path: str | os.PathLike[str]) -> Engine:
        """Save to a directory of its own and return the engine there.

        The directory appears whole or not at all; an artifact that stands there is replaced.
        Weights are hard-linked where the file system allows it, else copied; those of a whole
        ONNX model always are copied, since onnx reads no data from links.

        Raises:
            ArtifactError: files of this one were changed or are gone.
            BuildError: the directory holds something else, or cannot be written.
        """
        self._check_present()
        target = Path(path)
        if target.exists() and target.samefile(self.path):
            return self
        may_link = not self.manifest["options"].get("whole", False)
        with writing(target) as directory:
            for file in self.path.rglob("*"):
                place = directory / file.relative_to(self.path)
                if file.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link_or_copy(file, place, may_link)
            Artifact(directory)  # what was damaged since it was opened replaces nothing
        return Engine(Artifact(target), self.backend)

    def prune(self, path: str | os.PathLike[str]) -> Engine:
        """Save without weights; returns the engine there, which `refit` gives weights again.

        Code, graphs, recipe and tokenizer stay, and each weight's shape, dtype and sha256.

        Raises:
            ArtifactError: it is pruned already, or its weights are damaged.
            BuildError: the directory holds something else, or cannot be written.
        """
        self._check_present()
        return Engine(Artifact(prune(self.artifact, Path(path))), self.backend)

    def refit(
        self,
        weights: Any,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
        verify: str | None = None,
        progress: Callable[[str], None] = logger.info,
    ) -> Engine:
        """Save the same code with the weights of another checkpoint; returns the engine there.

        weights: a model in memory, a directory, a hub id or "demo": the same architecture, with a
            config that computes the same. They are what a build of that checkpoint would have
            written: concatenated and quantized by the recipes, calibrated anew on the token ids
            that the artifact has. Nothing is traced or compiled. tokenizer: where not the
            checkpoint's own, or else this engine's. verify: "engine" compares the result with
            Hugging Face as a build does, "capture" the graph alone; None for what the build did.

        Raises:
            ModelLoadError: the checkpoint cannot be read, or is of another model: says in what.
            ArtifactError, BuildError, VerificationError: nothing is left behind.
        """
        self._check_present()
        made = refit(
            self.artifact,
            weights,
            Path(path),
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            verify=verify,
            progress=progress,
        )
        return Engine(Artifact(made), self.backend)

    def __repr__(self) -> str:
        architecture = self.manifest["architecture"]
        return f"Engine({architecture}, backend={self.backend!r}, path={str(self.path)!r})"


def _link_or_copy(file: Path, place: Path, may_link: bool) -> None:
    if may_link and file.suffix == ".safetensors":
        try:
            os.link(file, place)
            return
        except OSError as error:
            logger.debug("no hard link to %s (%s): copied", place, error)
    shutil.copyfile(file, place)


def compile_model(
    model: Any,
    backend: str = "inductor",
    *,
    tokenizer: Any = None,
    progress: Callable[[str], None] = logger.info,
    **options: Any,
) -> Engine:
    """Compile a Hugging Face causal language model into an engine.

    model: a transformers model in memory (never changed), a directory, a hub id, or "demo".
    tokenizer: for a model in memory, its tokenizer or where to load it from; without one the
        engine takes token ids only. progress: called with a line when a phase of the build ends.
    options: the fields of `CompileOptions`: dtype, max_seq_len, max_num_tokens, max_num_seqs,
        block_size, optimization_level, verify, trust_remote_code.

    The engine lies in a staging directory that lives as long as the Engine; `save` keeps it.
    Segments that were compiled before come from the cache (INLAY_CACHE_DIR, ~/.cache/inlay).

    Raises:
        OptionError, ModelLoadError, UnsupportedModelError, BuildError, VerificationError: each
            says what is the matter and what to do; nothing is left behind.
    """
    validated = CompileOptions.from_kwargs({"backend": backend, **options})
    staging = _staging_directory()
    engine_dir = staging / "engine"
    try:
        lower(model, engine_dir, validated, tokenizer, progress)
        engine = Engine(Artifact(engine_dir))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    weakref.finalize(engine.artifact, _remove_staging, staging, os.getpid())
    return engine


def _remove_staging(staging: Path, owner: int) -> None:
    """Only in the process that made it: a forked child ends before its parent does."""
    if os.getpid() == owner:
        shutil.rmtree(staging, ignore_errors=True)


def build(
    model: Any,
    path: str | os.PathLike[str],
    options: CompileOptions,
    *,
    tokenizer: Any = None,
    progress: Callable[[str], None] = logger.info,
) -> Engine:
    """Compile straight into a directory: `compile_model(...).save(path)` with one write."""
    return Engine(Artifact(lower(model, Path(path), options, tokenizer, progress)))


def is_artifact(path: Any) -> bool:
    """Whether this names an artifact directory rather than a model."""
    return isinstance(path, str | os.PathLike) and (Path(path) / MANIFEST).is_file()


def _staging_directory() -> Path:
    """A fresh directory under the cache; those of dead processes are removed."""
    parent = cache_dir() / "staging"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return temporary_directory(parent, "engine-")
    except OSError as error:
        raise BuildError(
            f"the cache {parent} cannot be written: {error}; set INLAY_CACHE_DIR to a directory "
            "that can"
        ) from error
