"""The first wrong node of a segment: of its graph, else of what the backend compiled of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.fx import GraphModule, Interpreter, Node

from inlay.backends.artifact import Artifact, WeightReader, hash_files, write_json, write_manifest
from inlay.backends.atomic import temporary_directory
from inlay.backends.base import BACKEND_OPTIONS, BuildSettings, ModelLimits
from inlay.backends.cache import cache_dir
from inlay.backends.graph_json import graph_from_json, graph_key, graph_to_json
from inlay.backends.model import ProgramModel
from inlay.backends.program import SegmentStep
from inlay.backends.select import get_backend
from inlay.backends.step import StepInputs
from inlay.engine import Engine
from inlay.passes.check import relative_rms
from inlay.verify.graphs import Values
from inlay.verify.recapture import Recaptured


def first_wrong_node(
    again: Recaptured,
    engine: Engine,
    index: int,
    step: StepInputs,
    values: Values,
    tolerance: float,
) -> tuple[Node | None, str]:
    """The node and a word on what is wrong with it; None where it cannot be narrowed down.

    index: the segment's step in the program; values: right values of a run of this step's inputs.
    """
    call, right = engine.artifact.program.steps[index], again.program.steps[index]
    assert isinstance(call, SegmentStep)
    assert isinstance(right, SegmentStep)
    segment = again.segments[right.segment]
    artifact = engine.artifact
    stored = graph_from_json(artifact.json(f"segments/{call.segment}/graph.json"))
    node = _first_in_stored_graph(segment, stored, artifact, call, step, values, tolerance)
    if node is not None:
        return node, "whose graph or weights in the artifact are wrong"
    return _first_in_compiled_code(segment, engine, index, step, values, tolerance)


def _tensors(call: SegmentStep, step: StepInputs, values: Values) -> list[torch.Tensor]:
    """A segment's inputs: values of earlier steps, or the step's own."""
    own = {
        "input_ids": step.input_ids[None],
        "position_ids": step.position_ids[None],
        "logits_indices": step.logits_indices,
    }
    return [own[name] if name in own else values[name] for name in call.inputs]


def _record(gm: GraphModule, args: Sequence[torch.Tensor]) -> dict[Node, torch.Tensor]:
    found: dict[Node, torch.Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                found[n] = result
            return result

    with torch.inference_mode():
        Recorder(gm).run(*args)
    return found


def _differ(expected: torch.Tensor, value: torch.Tensor, tolerance: float) -> bool:
    return not relative_rms(expected, value) <= tolerance


def _first_in_stored_graph(
    segment: GraphModule,
    stored: GraphModule,
    artifact: Artifact,
    call: SegmentStep,
    step: StepInputs,
    values: Values,
    tolerance: float,
) -> Node | None:
    """Interpret the artifact's graph with the artifact's weights, node beside node."""
    reader = WeightReader(artifact)
    weights = [reader.get(name).clone() for name in call.weights]
    got = _record(stored, [*weights, *_tensors(call, step, values)])
    for node, other in zip(segment.graph.nodes, stored.graph.nodes, strict=False):
        if other in got and node.name in values:
            if _differ(values[node.name], got[other], tolerance):
                return node
        elif node.op == "call_function" and node.target != other.target:
            return node
    return None


def _first_in_compiled_code(
    segment: GraphModule,
    engine: Engine,
    index: int,
    step: StepInputs,
    values: Values,
    tolerance: float,
) -> tuple[Node | None, str]:
    """Compile the segment again with every intermediate value as one more output."""
    nodes = [
        node for node in segment.graph.nodes if node.op == "call_function" and node.name in values
    ]
    backend = engine.backend
    exposed = _expose(segment, [node.name for node in nodes])
    parent = cache_dir() / "staging"
    parent.mkdir(parents=True, exist_ok=True)
    directory = temporary_directory(parent, "bisect-")
    try:
        _build_exposed(engine, index, exposed, [node.name for node in nodes], directory)
        model = get_backend(backend).load(Artifact(directory))
        assert isinstance(model, ProgramModel)
        model.allocate_kv_cache(int(step.block_tables.max()) + 1)
        seen: Values = {}

        def keep(position: int, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            one = model.program.steps[position]
            names = one.outputs if isinstance(one, SegmentStep) else (one.output,)
            if position == index:
                seen.update(zip(names, (o.cpu().clone() for o in outputs), strict=True))
            return [values[name] for name in names]

        model.observer = keep
        model.forward(step)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for node in nodes:
        if _differ(values[node.name], seen[node.name], tolerance):
            return node, f"that {backend} compiles wrongly"
    call = engine.artifact.program.steps[index]
    assert isinstance(call, SegmentStep)
    first = next(node for node in nodes if node.name in call.outputs)
    return first, (
        f"that {backend} compiles wrongly, and rightly as soon as its intermediate values are "
        "asked for (its first output is shown)"
    )


def _expose(segment: GraphModule, names: Sequence[str]) -> GraphModule:
    """The same segment with these nodes as its outputs."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for node in segment.graph.nodes:
        if node.op != "output":
            copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    by_name = {node.name: copy for node, copy in copies.items()}
    graph.output(tuple(by_name[name] for name in names))
    return GraphModule(torch.nn.Module(), graph)


def _build_exposed(
    engine: Engine, index: int, exposed: GraphModule, names: Sequence[str], directory: Path
) -> None:
    """A copy of the artifact whose step of this index calls the exposed segment."""
    manifest, path = engine.manifest, engine.path
    shutil.copytree(path / "model", directory / "model")
    shutil.copytree(path / "segments", directory / "segments")  # the build writes over some
    shutil.copytree(path / "weights", directory / "weights", copy_function=_link)
    shutil.copyfile(path / "recipe.json", directory / "recipe.json")
    data = graph_to_json(exposed)
    key = graph_key(data)
    write_json(directory / "segments" / key / "graph.json", data)
    limits = ModelLimits(**manifest["limits"])
    options = manifest["options"]
    chosen = {name: options[name] for name in BACKEND_OPTIONS if name in options}
    level = options["optimization_level"]
    settings = BuildSettings(limits, level, lambda line: None, **{**chosen, "whole": False})
    backend = get_backend(engine.backend)
    steps = list(engine.artifact.program.steps)
    call = steps[index]
    assert isinstance(call, SegmentStep)
    steps[index] = replace(call, segment=key, outputs=tuple(names))
    program = replace(engine.artifact.program, steps=tuple(steps))
    backend.check(program, {key: exposed}, settings)
    target = backend.build(program, {key: exposed}, directory / "segments", settings)
    write_json(directory / "program.json", program.to_json())
    files = hash_files(directory)
    write_manifest(directory, {**manifest, "target": target, "files": files})


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
