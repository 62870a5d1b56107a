"""From segments to plans: what TensorRT refuses, the jobs of a build, its report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx import GraphModule

from inlay.backends.artifact import write_json
from inlay.backends.base import BuildSettings, ModelLimits
from inlay.backends.onnx.cached import convert_segments
from inlay.backends.program import Program, SegmentStep
from inlay.backends.step import SMALLEST
from inlay.backends.tensorrt.library import Library
from inlay.backends.tensorrt.network import Log, Profile, make_logger, parse
from inlay.backends.tensorrt.supported import refusals
from inlay.backends.tensorrt.workers import Job, build_engines, place_of
from inlay.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

MODEL = "tensorrt.onnx"
"""In a segment's directory: its graph without weights, which `refit` builds plans of again."""
REPORT = "engines.json"
"""In the segments' directory: what the builder said of each engine."""
USUAL_DECODE = 8
"""Tokens that decode kernels are chosen for: between one request and a full batch."""
POSITIVE = 0x3C
"""A byte that, repeated, is a finite positive number of every type: scales must be positive."""


def plan_name(index: int | str) -> str:
    """Of the engine of a program's step, in its segment's directory; "*" for those of any."""
    return f"step-{index}.plan"


@dataclass(frozen=True)
class Look:
    """A segment before a build: its ONNX model, or why TensorRT cannot take it."""

    model: bytes
    refusals: tuple[str, ...]


def look(key: str, gm: GraphModule, library: Library, settings: BuildSettings) -> Look:
    """Ask our own rules, the converter, then the library's parser."""
    found = refusals(gm, settings.target)
    if found:
        return Look(b"", tuple(found))
    try:
        models, _ = convert_segments({key: gm}, "tensorrt", settings.origin)
    except UnsupportedModelError as error:
        return Look(b"", (str(error),))
    return Look(models[key], tuple(parser_refusals(library, models[key])))


def parser_refusals(library: Library, data: bytes) -> list[str]:
    """What the library's parser says against a model, with the node it was made of and its source
    line. The weights' numbers do not matter to it."""
    import onnx

    model = onnx.load_from_string(data)
    sizes = {t.name: num_bytes(t) for t in model.graph.initializer if t.external_data}
    # Each has its own: the library knows weights by their address.
    weights = {name: np.full(size, POSITIVE, dtype=np.uint8) for name, size in sizes.items()}
    log = Log()
    logger = make_logger(library, log)
    builder = library.module.Builder(logger)
    _, _, found = parse(library, logger, builder, data, weights)
    told = {node.name: node.doc_string for node in model.graph.node}
    return [
        f"{one['node'].split('.')[0]} ({told.get(one['node']) or one['operator']}): {one['why']}"
        for one in found
    ]


def num_bytes(tensor: onnx.TensorProto) -> int:
    """Of an initializer's numbers, of which there may be two in a byte."""
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    count = int(np.prod(tensor.dims))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-count // 2)
    return count * tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def profiles(model: onnx.ModelProto, limits: ModelLimits) -> list[Profile]:
    """Shapes of the inputs for decode and for prefill. A dynamic size is a number of tokens or of
    rows of logits, of which there are no more."""
    decode, prefill = max(limits.max_num_seqs, SMALLEST), max(limits.max_num_tokens, SMALLEST)
    usual = min(USUAL_DECODE, decode)
    return [
        {
            value.name: tuple(_shape(value, size) for size in sizes)  # type: ignore[misc]
            for value in model.graph.input
        }
        for sizes in ((SMALLEST, usual, decode), (SMALLEST, prefill, prefill))
    ]


def _shape(value: onnx.ValueInfoProto, size: int) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(size if dim.dim_param else dim.dim_value for dim in dims)


def build_plans(
    program: Program, directory: Path, library: Library, settings: BuildSettings, keys: set[str]
) -> dict[str, Any]:
    """Build the engines of all steps that call these segments, of the MODEL in each directory and
    the weights beside them; returns a summary for the manifest."""
    jobs = [
        _job(index, step, directory, settings)
        for index, step in enumerate(program.steps)
        if isinstance(step, SegmentStep) and step.segment in keys
    ]
    if not jobs:
        return {"engines": 0, "plan_bytes": 0}
    facts, build = build_engines(jobs, library.name, settings.progress)
    engines = [{"step": job.name, **facts[job.name]} for job in jobs]
    write_json(directory / REPORT, {**build, "engines": engines})
    total = {name: sum(one[name] for one in facts.values()) for name in ("plan_bytes", "num_nodes")}
    num_layers = sum(len(one["layers"]) for one in facts.values())
    settings.progress(
        f"{len(jobs)} engines, {total['plan_bytes'] / 1e6:.1f} MB: each holds its step's weights, "
        f"so that equal segments have one each; {total['num_nodes']} layers became {num_layers} "
        f"kernels, over two profiles; memory {build['peak_bytes'] >> 20} MiB at most, "
        f"{build['estimated_bytes'] >> 20} MiB were estimated"
    )
    return {
        "engines": len(jobs),
        "plan_bytes": total["plan_bytes"],
        "num_kernels": num_layers,
        **build,
    }


def _job(index: int, step: SegmentStep, directory: Path, settings: BuildSettings) -> Job:
    import onnx

    folder, weights = directory / step.segment, directory.parent / "weights"
    model = onnx.load(folder / MODEL, load_external_data=False)
    places = json.loads((weights / "index.json").read_text())
    by_name: dict[str, tuple[str, int, int]] = {}
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in external:
        place = places[step.weights[int(tensor.name[1:])]]
        by_name[tensor.name] = place_of(weights / place["file"], place["tensor"])
    return Job(
        name=f"step {index} ({step.segment})",
        model=str(folder / MODEL),
        weights=by_name,
        profiles=profiles(model, settings.limits),
        target=settings.target,
        plan=str(folder / plan_name(index)),
        int4=[tensor.name for tensor in external if tensor.data_type == onnx.TensorProto.INT4],
    )
