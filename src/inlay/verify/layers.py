"""The error after each decoder layer, ours and Hugging Face's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

from inlay.backends.model import ProgramModel
from inlay.backends.program import SegmentStep
from inlay.backends.step import StepInputs
from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.guards import in_float32
from inlay.passes.check import relative_rms
from inlay.passes.graph import calls
from inlay.verify.graphs import (
    GraphRunner,
    Values,
    blocks_per_request,
    last_nodes,
    module_outputs,
    module_paths,
    packed_step,
)
from inlay.verify.recapture import Recaptured

SAME = 1e-3
"""Two values of the passed graph that are this near to a layer's output are both it."""


@dataclass(frozen=True)
class LayerError:
    """Hidden states after one decoder layer against Hugging Face's in float32.

    name: of the layer, or "...'s input" for the LM head, which takes the last one's output, normed.
    ours, hugging_face: relative RMS errors; hugging_face in the engine's dtype, None in float32.
    seen_in: "engine" where the value leaves a compiled segment; "graph" where it is inside one and
        the rewritten graph, interpreted, had to stand for it; "capture" where nothing was built.
    """

    name: str
    ours: float
    hugging_face: float | None
    seen_in: str


def layer_names(gm: GraphModule) -> list[str]:
    """The decoder layers, as the module paths of the attention calls tell: the outermost numbered
    module of each."""
    names: dict[str, None] = {}
    for node in calls(gm, torch.ops.inlay.attention.default):
        numbered = [path for path in module_paths(node) if re.search(r"\.\d+$", path)]
        names.update(dict.fromkeys(numbered[:1]))
    return list(names)


def layer_errors(
    again: Recaptured,
    model: PreTrainedModel,
    requests: Sequence[Sequence[int]],
    engine: ProgramModel | None,
) -> list[LayerError]:
    """A row for each decoder layer whose output is a value of its own after the passes, and one
    for the LM head's input; engine None: for each decoder layer, of the captured graph."""
    size = again.block_size
    step = packed_step(requests, again.num_groups, size)
    num_blocks = len(requests) * blocks_per_request(requests, size)
    names = layer_names(again.captured.graph)
    shell = build_shell(model, REFERENCE, max_seq_len=again.max_seq_len)
    head = _head(shell)
    native = {}
    if model.dtype != torch.float32:
        native = module_outputs(shell, names, requests, head)
    exact = module_outputs(in_float32(shell), names, requests, head)
    captured = GraphRunner(again.captured, num_blocks, size)(step)
    places: dict[str, tuple[torch.Tensor, str]] = {}
    last = last_nodes(again.captured.graph)
    for name in names:
        if name in exact and (node := _of_shape(last[name], captured, exact[name])) is not None:
            places[name] = captured[node.name], "capture"
    if engine is not None:
        passed = GraphRunner(again.passed, num_blocks, size)(step)
        seen = engine_values(engine, step, num_blocks)
        # The last layer's output is normed at once: the head's input stands for it.
        places = {
            name: _nearest(places[name][0], passed, seen) for name in names[:-1] if name in places
        }
        places |= {name: (seen[again.program.hidden], "engine") for name in head if name in exact}
    return [
        LayerError(
            f"{name}'s input" if name in head else name,
            relative_rms(exact[name], value),
            relative_rms(exact[name], native[name]) if name in native else None,
            where,
        )
        for name, (value, where) in places.items()
    ]


def _head(shell: PreTrainedModel) -> list[str]:
    """The LM head's name, as a list; empty where the model has none."""
    head = shell.get_output_embeddings()
    return [name for name, module in shell.named_modules() if module is head][:1]


def _of_shape(nodes: Sequence[Node], values: Values, like: torch.Tensor) -> Node | None:
    """The last of a module's nodes whose value has the shape of the module's output."""
    return next((n for n in nodes if n.name in values and values[n.name].shape == like.shape), None)


@torch.inference_mode()
def engine_values(engine: ProgramModel, step: StepInputs, num_blocks: int) -> Values:
    """Every value that passes between the steps of an engine's program."""
    values: Values = {}

    def keep(index: int, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        call = engine.program.steps[index]
        names = call.outputs if isinstance(call, SegmentStep) else (call.output,)
        # Copied: compiled segments may use the memory again.
        values.update(zip(names, (output.cpu().clone() for output in outputs), strict=True))
        return outputs

    engine.allocate_kv_cache(num_blocks)
    engine.observer = keep
    try:
        engine.forward(step)
    finally:
        engine.observer = None
    return values


def _nearest(value: torch.Tensor, passed: Values, seen: Values) -> tuple[torch.Tensor, str]:
    """A captured value after the passes: fusion renames nodes, so it is found by its numbers."""
    errors = {
        name: relative_rms(value, other)
        for name, other in passed.items()
        if other.shape == value.shape and other.dtype == value.dtype
    }
    best = min(errors, key=errors.__getitem__)
    outside = [name for name in errors if name in seen and errors[name] <= errors[best] + SAME]
    if outside:
        return seen[min(outside, key=errors.__getitem__)], "engine"
    return passed[best], "graph"
