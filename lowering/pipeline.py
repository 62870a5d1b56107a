"""The pipeline: Hugging Face model -> captured graph -> passes -> program -> backend -> artifact.

This is the file to read first. `lower` is the whole of it, in order.
"""

from __future__ import annotations

import gc
import json
import logging
import platform
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import inlay
from inlay.backends.artifact import (
    Artifact,
    hash_files,
    weights_sha256,
    write_json,
    write_manifest,
    write_weights,
)
from inlay.backends.atomic import Claim, claimed
from inlay.backends.base import (
    BACKEND_OPTIONS,
    Backend,
    BackendOptions,
    BuildSettings,
    Known,
    ModelLimits,
)
from inlay.backends.graph_json import graph_to_json
from inlay.backends.program import Program
from inlay.backends.select import get_backend
from inlay.lowering.capture import capture
from inlay.lowering.export import Captured, max_positions, padding_token
from inlay.lowering.guards import (
    References,
    check_capture,
    check_engine,
    packed_check,
    reference_logits,
)
from inlay.lowering.loading import Source, dtype_name, load_pooling, load_source
from inlay.lowering.options import CompileOptions, check_against_model
from inlay.lowering.partition import partition
from inlay.lowering.quantization import (
    check_calibration,
    check_ignored,
    check_unquantized,
    make_plan,
    sure_schemes,
    write_samples,
)
from inlay.lowering.quantization_check import quantized_references
from inlay.lowering.rope import data_dependent
from inlay.lowering.stored_graph import write_graph
from inlay.passes.check import Check
from inlay.passes.graph import copy_graph
from inlay.passes.pass_manager import (
    AFTER_QUANTIZATION,
    BEFORE_QUANTIZATION,
    PassReport,
    quantization,
    run_passes,
)
from inlay.passes.quantize.config import NONE, Scheme
from inlay.passes.quantize.plan import Plan
from inlay.passes.weights import WeightMaker

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

ONE_AT_A_TIME = threading.RLock()
"""torch.export, and transformers while a model is loaded, patch what the whole process shares."""


class Phases:
    """Times the phases of a build and tells them to whoever watches."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)
        self.progress(f"{name}: {self.seconds[name]:.1f} s")


def lower(
    model: Any,
    target: Path,
    options: CompileOptions,
    tokenizer: Any = None,
    progress: Progress = logger.info,
) -> Path:
    """Compile a model into an artifact at target; returns target. Threads wait for each other.

    model: a transformers causal LM, a directory, a hub id or "demo". tokenizer: for a model in
    memory, its tokenizer or a directory or hub id that has it. progress gets a line per phase.

    Raises:
        ModelLoadError, UnsupportedModelError, OptionError, BuildError: see each phase.
        VerificationError: the result does not compute what Hugging Face computes.
    """
    backend = get_backend(options.backend)
    with claimed(target) as claim, ONE_AT_A_TIME:
        _lower(model, claim, backend, options, tokenizer, Phases(progress))
    return target


def _lower(
    model: Any,
    claim: Claim,
    backend: Backend,
    options: CompileOptions,
    tokenizer: Any,
    phase: Phases,
) -> None:
    progress = phase.progress
    with phase("load"):
        source = _load(model, backend, options, tokenizer)
        del model
    backend.prepare(BackendOptions(**_own_options(options)))
    name, hf = source.name, source.model
    dtype = next(p.dtype for p in hf.parameters())
    max_seq_len = check_against_model(options, max_positions(hf))
    with phase("capture"):
        captured = capture(hf, options.max_num_tokens, max_seq_len)
        limits = _limits(hf, captured, options, max_seq_len)
        references = reference_logits(hf, captured, max_seq_len)
        check = packed_check(captured, references, options.block_size)
        errors = {
            "hugging_face": references.noise,
            "capture": check_capture(captured, references, check),
        }
    if kinds := data_dependent(hf):
        logger.warning(
            "RoPE of type %s: the engine takes the frequencies for %d tokens (max_seq_len) for "
            "every request; Hugging Face chooses them by the longest request of each batch",
            ", ".join(kinds),
            max_seq_len,
        )
    with phase("passes"):
        every_pass = check if options.verify == "pass" else None
        reports = [*captured.reports, *run_passes(captured.graph, BEFORE_QUANTIZATION, every_pass)]
        fused = replace(captured, graph=copy_graph(captured.graph))
        plan = source.stored
    if options.quantization != NONE and plan is None:
        with phase("calibrate"):
            plan = make_plan(options.quantization, captured, source.tokenizer, limits, progress)
    if plan is not None:
        with phase("quantize"):
            done, references = quantize(captured, plan, references, check, source, every_pass)
            reports += done
            errors["quantization"] = references.rounding
    with phase("partition"):
        reports += run_passes(captured.graph, AFTER_QUANTIZATION, every_pass)
        program, segments = partition(captured.graph, dtype)
    settings = build_settings(limits, options, progress, name)
    with phase("backend check"):
        backend.check(program, segments, settings)
    with claim.filling() as directory:
        with phase("weights"):
            write_model(directory, source)
            if plan is not None and plan.samples:
                write_samples(directory, plan.samples)
            write_json(directory / "recipe.json", captured.graph.meta["recipes"])
            write_graph(directory, fused, hf)
            write_weights(directory, weights_of(program, captured))
        # The engine is checked with the artifact's weights alone.
        del source, hf, captured, fused, check, every_pass, plan
        gc.collect()  # modules lie in reference cycles, their weights with them
        with phase("compile"):
            for key, segment in segments.items():
                write_json(directory / "segments" / key / "graph.json", graph_to_json(segment))
            on = backend.build(program, segments, directory / "segments", settings)
        write_json(directory / "program.json", program.to_json())
        files = hash_files(directory)
        event = {"made_by": "build", "origin": name, "weights_sha256": weights_sha256(files)}
        manifest = {
            **_manifest(directory, options, limits, program, reports),
            "target": on,
            "origin": name,
            "rebuild": rebuild_command(options, name),
            "provenance": [event],
            "files": files,
        }
        if options.verify != "capture":
            with phase("verify"):
                write_manifest(directory, manifest)
                manifest["checked"] = check_build(backend, directory, references, errors)
        manifest |= {"errors": errors, "phases": phase.seconds}
        write_manifest(directory, manifest)


def _load(model: Any, backend: Backend, options: CompileOptions, tokenizer: Any) -> Source:
    """The model, refused as soon as enough is known to."""
    config, own = options.quantization, _own_options(options)
    check_calibration(config)
    asked = sure_schemes(config)
    dtype = "" if options.dtype == "auto" else options.dtype
    backend.check_early(Known(dtype=dtype, schemes=asked, **own))

    def look(dtype: str, stored: tuple[Scheme, ...]) -> None:
        schemes = stored or asked
        backend.check_early(Known(dtype=dtype, schemes=schemes, is_stored=bool(stored), **own))

    source = load_source(model, options.dtype, tokenizer, options.trust_remote_code, look)
    check_unquantized(config, source)
    check_ignored(config, source)
    schemes, is_stored = sure_schemes(config, source), source.stored is not None
    dtype = dtype_name(source.model.dtype)
    backend.check_early(Known(dtype=dtype, schemes=schemes, is_stored=is_stored, **own))
    return source


def _own_options(options: CompileOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in BACKEND_OPTIONS}


def build_settings(
    limits: ModelLimits, options: CompileOptions, progress: Progress, origin: str
) -> BuildSettings:
    own = _own_options(options)
    return BuildSettings(limits, options.optimization_level, progress, origin=origin, **own)


def check_build(
    backend: Backend, directory: Path, references: References, errors: dict[str, float]
) -> str:
    """Compare a finished build with Hugging Face; returns what was compared, in words.

    Where the engine cannot run here the error is not its own, and has another name.
    """
    model, what, is_engine = backend.load_to_check(Artifact(directory))
    errors["engine" if is_engine else "stand_in"] = check_engine(model, references, what)
    return what


def quantize(
    captured: Captured,
    plan: Plan,
    references: References,
    check: Check,
    source: Source,
    every_pass: Check | None = None,
) -> tuple[list[PassReport], References]:
    """Quantize a captured graph in place, and judge it layer by layer; returns what the pass did
    and the logits that an engine must give."""
    captured.sources = {**captured.sources, **plan.given}
    before = copy_graph(captured.graph)
    reports = run_passes(captured.graph, [quantization(plan)], every_pass)
    if not any(report.matches for report in reports):
        logger.warning(
            "no layer of %s was quantized: all are left out, or of odd sizes", source.name
        )
    references = quantized_references(
        before, captured.graph, references, check, plan is source.stored
    )
    return reports, references


def _limits(
    model: PreTrainedModel, captured: Captured, options: CompileOptions, max_seq_len: int
) -> ModelLimits:
    max_num_tokens = min(options.max_num_tokens, captured.max_num_tokens)
    return ModelLimits(
        vocab_size=model.config.get_text_config().vocab_size,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        max_num_seqs=min(options.max_num_seqs, max_num_tokens),
        block_size=options.block_size,
        padding_token=padding_token(model),
    )


def weights_of(program: Program, captured: Captured) -> Iterator[tuple[str, torch.Tensor]]:
    """The program's weights in order of use, each made by its recipe when its turn comes."""
    make = WeightMaker(captured.graph.meta["recipes"], captured.sources.__getitem__)
    for name in program.weight_names:
        yield name, make(name)


def write_model(directory: Path, source: Source) -> None:
    """What transformers needs beside the weights: config, generation config, tokenizer."""
    folder = directory / "model"
    folder.mkdir()
    source.model.config.save_pretrained(folder)
    if getattr(source.model, "generation_config", None) is not None:
        # Not save_pretrained: it refuses contradictions that many checkpoints have.
        text = source.model.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    if pooling := load_pooling(source.model):
        (folder / "pooling.json").write_text(json.dumps(pooling))


def _manifest(
    directory: Path,
    options: CompileOptions,
    limits: ModelLimits,
    program: Program,
    reports: list[PassReport],
) -> dict[str, Any]:
    return {
        "inlay": inlay.__version__,
        "architecture": json_config(directory)["model_type"],
        "backend": options.backend,
        "dtype": program.dtype,
        "packages": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "limits": asdict(limits),
        "options": options.to_json(),
        "num_segments": len(program.segment_keys),
        "passes": [asdict(report) for report in reports],
    }


def json_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "model" / "config.json").read_text())


def rebuild_command(options: CompileOptions, source: str) -> str:
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
        for name, value in options.to_json().items()
        if value != getattr(CompileOptions, name)
    ]
    return " ".join(["inlay build", shlex.quote(source), "-o DIR", *flags])
