"""New weights for a compiled model: the build's recipes and calibration again, without tracing and
without a compiler.

The artifact keeps the captured graph as it was before quantization. New weights are put through
what follows of the pipeline, and must come out as the program that was compiled.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inlay.backends.artifact import (
    SELF,
    Artifact,
    hash_files,
    weights_sha256,
    write_manifest,
    write_weights,
)
from inlay.backends.atomic import Claim, claimed
from inlay.backends.base import BuildSettings, ModelLimits
from inlay.backends.prune import copy_without, describe, files_with_weights
from inlay.backends.select import get_backend
from inlay.errors import ArtifactError, ModelLoadError, OptionError
from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.export import Captured
from inlay.lowering.guards import (
    References,
    check_capture,
    every_row,
    packed_check,
    reference_logits,
)
from inlay.lowering.loading import Source, load_source, load_tokenizer
from inlay.lowering.options import CompileOptions
from inlay.lowering.partition import partition
from inlay.lowering.pipeline import (
    ONE_AT_A_TIME,
    Phases,
    Progress,
    build_settings,
    check_build,
    quantize,
    rebuild_command,
    weights_of,
    write_model,
)
from inlay.lowering.quantization import SAMPLES_FILE, make_plan
from inlay.lowering.same_model import check_program, check_same_model, check_stored
from inlay.lowering.stored_graph import own_tensors, read_graph
from inlay.passes.check import Check
from inlay.passes.pass_manager import AFTER_QUANTIZATION, run_passes
from inlay.passes.quantize.config import NONE
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

OF_OLD_WEIGHTS = ("pruned", "checked")
"""Entries of a manifest that say nothing of new weights."""


def refit(
    artifact: Artifact,
    weights: Any,
    target: Path,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    verify: str | None = None,
    progress: Progress = logger.info,
) -> Path:
    """Write an artifact's code with the weights of another checkpoint to target; returns it.

    weights: a model in memory, a directory, a hub id or "demo", of the same architecture and
    config. tokenizer: where not the checkpoint's own, or else the artifact's. verify: as the option
    of a build; None for the artifact's own. Calibration is done again, on the token ids that the
    artifact has.

    Raises:
        ModelLoadError: the checkpoint cannot be read, or is of another model: says in what.
        ArtifactError: the artifact is damaged.
        VerificationError: the result does not compute what Hugging Face computes.
        BuildError: target cannot be written, or holds something else.
    """
    given = {**artifact.manifest["options"], **({} if verify is None else {"verify": verify})}
    try:
        options = CompileOptions.from_kwargs({**given, "trust_remote_code": trust_remote_code})
    except OptionError as error:
        if verify is not None:
            raise
        raise ArtifactError(
            f"artifact {artifact.path} was built by another Inlay, with options that this one does "
            f"not know: {error}; rebuild it: {artifact.manifest['rebuild']}"
        ) from error
    backend = get_backend(artifact.manifest["backend"])
    backend.check_refit(_settings(artifact, options, progress, ""))
    with claimed(target) as claim, ONE_AT_A_TIME:
        phase = Phases(progress)
        with phase("load"):
            dtype = artifact.manifest["dtype"]
            source = load_source(weights, dtype, tokenizer, trust_remote_code)
            del weights
        _Refit(artifact, options, phase, progress).run(source, claim)
    return target


def _settings(
    artifact: Artifact, options: CompileOptions, progress: Progress, origin: str
) -> BuildSettings:
    """As the build's, of the library that made the artifact."""
    settings = build_settings(ModelLimits(**artifact.manifest["limits"]), options, progress, origin)
    library = artifact.manifest["target"].get("library", settings.library)
    return replace(settings, library=library)


class _Refit:
    """The steps in order; artifact is what is refitted."""

    def __init__(
        self, artifact: Artifact, options: CompileOptions, phase: Phases, progress: Progress
    ) -> None:
        self.artifact, self.options = artifact, options
        self.phase, self.progress = phase, progress
        self.limits = ModelLimits(**artifact.manifest["limits"])
        self.errors: dict[str, float] = {}
        self.num_same: int | None = None

    def run(self, source: Source, claim: Claim) -> None:
        with self.phase("graph"):
            captured, references, check = self._captured(source)
        references = self._quantized(source, captured, references, check)
        run_passes(captured.graph, AFTER_QUANTIZATION)
        dtype = getattr(torch, self.artifact.manifest["dtype"])
        check_program(source.name, self.artifact, partition(captured.graph, dtype)[0])
        with claim.filling() as directory:
            with self.phase("weights"):
                self._write(directory, source, captured)
            name = source.name
            del source, captured, check
            gc.collect()  # modules lie in reference cycles, their weights with them
            with self.phase("code"):
                backend = get_backend(self.artifact.manifest["backend"])
                settings = _settings(self.artifact, self.options, self.progress, name)
                target = self.artifact.manifest["target"]
                target = {**target, **backend.refit(directory, self.artifact.program, settings)}
            manifest = {**self._manifest(directory, name), "target": target}
            if self.options.verify != "capture":
                with self.phase("verify"):
                    write_manifest(directory, manifest)
                    checked = check_build(backend, directory, references, self.errors)
                    manifest["checked"] = checked
            manifest |= {"errors": self.errors, "phases": self.phase.seconds}
            write_manifest(directory, manifest)

    def _captured(self, source: Source) -> tuple[Captured, References, Check]:
        """The stored graph over the new model, compared with Hugging Face."""
        longest = self.limits.max_seq_len
        shell = build_shell(source.model, REFERENCE, max_seq_len=longest)
        own = own_tensors(shell)
        check_same_model(self.artifact, source, own)
        captured = read_graph(self.artifact, own)
        references = reference_logits(source.model, captured, longest)
        check = packed_check(captured, references, self.limits.block_size)
        self.errors["hugging_face"] = references.noise
        self.errors["capture"] = check_capture(captured, references, every_row(check, references))
        return captured, references, check

    def _quantized(
        self, source: Source, captured: Captured, references: References, check: Check
    ) -> References:
        """The graph quantized in place, as the build did it; returns what an engine must give."""
        check_stored(self.artifact, source)
        config, plan = self.options.quantization, source.stored
        if config == NONE and plan is None:
            return references
        if plan is None:
            with self.phase("calibrate"):
                plan = self._plan(source, captured)
        with self.phase("quantize"):
            _, references = quantize(captured, plan, references, check, source)
            self.errors["quantization"] = references.rounding
        return references

    def _plan(self, source: Source, captured: Captured) -> Plan:
        config = self.options.quantization
        if config.needs_calibration:
            config = replace(config, calibration=str(self.artifact.path / SAMPLES_FILE))
        return make_plan(config, captured, source.tokenizer, self.limits, self.progress)

    def _write(self, directory: Path, source: Source, captured: Captured) -> None:
        old = self.artifact.path
        left_out = {
            *files_with_weights(old, self.artifact.manifest["backend"]),
            old / "weights" / "index.json",
        }
        names = [n for n in self.artifact.manifest["files"] if not n.startswith("model/")]
        copy_without(old, directory, names, left_out)
        if source.tokenizer is None:
            source.tokenizer = load_tokenizer(self.artifact.model_dir)
        write_model(directory, source)
        pooling = Path("model", "pooling.json")
        if (old / pooling).is_file() and not (directory / pooling).is_file():
            shutil.copyfile(old / pooling, directory / pooling)
        write_weights(directory, self._compared(weights_of(self.artifact.program, captured)))

    def _compared(
        self, weights: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights, beside what a pruned artifact knows of those that it had."""
        if not self.artifact.is_pruned:
            yield from weights
            return
        self.num_same, before = 0, self.artifact.manifest["pruned"]["weights"]
        for name, tensor in weights:
            facts, due = describe(tensor), before[name]
            if (facts["shape"], facts["dtype"]) != (due["shape"], due["dtype"]):
                raise ModelLoadError(f"weight {name} is {facts}, the artifact was built for {due}")
            self.num_same += facts["sha256"] == due["sha256"]
            yield name, tensor
        self.progress(f"{self.num_same} of {len(before)} weights are those that were pruned")

    def _manifest(self, directory: Path, name: str) -> dict[str, Any]:
        files = hash_files(directory)
        before = {k: v for k, v in self.artifact.manifest.items() if k not in OF_OLD_WEIGHTS}
        event = {
            "made_by": "refit",
            "origin": name,
            "of": before[SELF],
            "weights_sha256": weights_sha256(files),
        }
        if self.num_same is not None:
            event["same_as_pruned"] = self.num_same
        return {
            **before,
            "origin": name,
            "rebuild": rebuild_command(self.options, name),
            "options": self.options.to_json(),
            "provenance": [*before["provenance"], event],
            "files": files,
        }
