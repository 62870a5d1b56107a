"""Where does it first go wrong? Capture, then each pass, then each step of the program, then the
nodes of the segment.

Each stage is fed what the stage before it, found right, gives; so the first one that differs is
the one at fault, whatever errors follow from it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

from inlay.backends.model import ProgramModel
from inlay.backends.program import AttentionStep, SegmentStep
from inlay.backends.step import StepInputs
from inlay.engine import Engine
from inlay.errors import VerificationError
from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.export import Captured
from inlay.lowering.guards import (
    References,
    check_capture,
    in_float32,
    packed_check,
    reference_logits,
)
from inlay.passes import pass_manager
from inlay.passes.check import Check, relative_rms
from inlay.passes.graph import copy_graph
from inlay.verify.graphs import (
    GraphRunner,
    Values,
    blocks_per_request,
    last_nodes,
    module_outputs,
    module_paths,
    packed_step,
    source_of,
)
from inlay.verify.recapture import Recaptured
from inlay.verify.segment import first_wrong_node
from inlay.verify.workload import Run

STEP_TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Relative RMS error of one step fed with right inputs: several roundings, the unit of which is
6e-8, 5e-4 and 4e-3. Beyond it a step is taken for the cause, so a tight bound may blame a right one
and a loose one misses a small fault; the verdict itself does not depend on it."""

MAX_STEPS = 16
"""Steps of the run that are gone through where none is known to be wrong."""


@dataclass(frozen=True)
class Finding:
    """The first fault.

    stage: "capture", "pass", "segment", "attention", or "" where no single part is at fault.
    what: one sentence. name: of the pass, the segment's key or the attention's layer. node,
    module, source: the first node that differs, the model's module and the line it came from.
    error: relative RMS error there.
    """

    stage: str
    what: str
    name: str = ""
    node: str = ""
    module: str = ""
    source: str = ""
    error: float | None = None


def bisect(
    again: Recaptured,
    model: PreTrainedModel,
    engine: Engine | None = None,
    run: Run | None = None,
    wrong_steps: Sequence[int] = (),
) -> Finding:
    """The first fault of an engine; without one, of capture and passes alone.

    run: what the engine was asked. wrong_steps: those of its steps that gave wrong logits.
    """
    references = reference_logits(model, again.captured, again.max_seq_len)
    check = packed_check(again.captured, references, again.block_size)
    found = bisect_capture(again.captured, model, references, check, again)
    found = found or bisect_passes(again.captured, check)
    if found is None and engine is not None and run is not None:
        found = bisect_steps(again, engine, run, wrong_steps)
    return found or Finding("", "no pass and no step differs from its reference by itself")


def _at(node: Node) -> dict[str, str]:
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]  # the op that yields several
    paths = module_paths(node)
    return {
        "node": node.name,
        "module": paths[-1] if paths else "",
        "source": source_of(node),
    }


def bisect_capture(
    captured: Captured,
    model: PreTrainedModel,
    references: References,
    check: Check,
    again: Recaptured,
) -> Finding | None:
    """The first module, in the order in which they end, whose output is not Hugging Face's."""
    try:
        check_capture(captured, references, check)
        return None
    except VerificationError:
        pass  # that is what is looked into
    requests = [reference.token_ids.tolist() for reference in references.requests]
    size = again.block_size
    step = packed_step(requests, again.num_groups, size)
    values = GraphRunner(captured, blocks_per_request(requests, size), size)(step)
    nodes = last_nodes(captured.graph)
    shell = in_float32(build_shell(model, REFERENCE, max_seq_len=again.max_seq_len))
    outputs = module_outputs(shell, nodes, requests)
    for name, expected in outputs.items():
        # Any of its nodes: a module that yields several tensors may make the first one first.
        alike = [n for n in nodes[name] if values[n.name].shape == expected.shape]
        errors = [relative_rms(expected, values[n.name]) for n in alike]
        if errors and not any(error <= references.tolerance for error in errors):
            node, error = alike[0], errors[0]
            what = f"the captured graph already differs: module {name or '(root)'} yields other"
            place = {**_at(node), "module": name}
            return Finding(
                "capture", f"{what} values than Hugging Face's", name, **place, error=error
            )
    return Finding("capture", "the captured graph already differs, in no module that can be told")


def bisect_passes(captured: Captured, check: Check) -> Finding | None:
    """The first pass whose graph gives other outputs than the graph before it."""
    graph = copy_graph(captured.graph)
    for one in pass_manager.PASSES:
        before = copy_graph(graph)
        old = check.run(graph)
        pass_manager.run_passes(graph, [one])
        error = check.error(old, check.run(graph))
        if not error <= check.tolerance:
            node = _first_difference(check, before, graph)
            what = f"pass {one.name} changes the outputs"
            if node is None:
                return Finding("pass", what, one.name, error=error)
            return Finding("pass", what, one.name, **_at(node), error=error)
    return None


def _first_difference(check: Check, before: GraphModule, after: GraphModule) -> Node | None:
    """The node that `first_difference` names: it says so in words."""
    words = check.first_difference(before, after).split()
    names = {node.name: node for node in after.graph.nodes}
    return names.get(words[2]) if words[:2] == ["first", "at"] else None


def bisect_steps(
    again: Recaptured, engine: Engine, run: Run, wrong_steps: Sequence[int]
) -> Finding | None:
    """The first step of the program that differs from the rewritten graph, fed with its values."""
    program = engine.artifact.program
    known = [(type(step), _outputs(step)) for step in again.program.steps]
    if known != [(type(step), _outputs(step)) for step in program.steps]:
        return Finding("", "the artifact's steps are not those that this version makes: rebuild it")
    model = engine.load_model()
    assert isinstance(model, ProgramModel), "a backend's model that runs no program"
    tolerance = STEP_TOLERANCES[model.dtype]
    truth = GraphRunner(again.passed, run.num_blocks, again.block_size)
    model.allocate_kv_cache(run.num_blocks)
    last = min(wrong_steps, default=MAX_STEPS)
    worst = 0.0
    for step in run.steps[: last + 1]:
        values = truth(step)
        errors = step_errors(model, step, values)
        worst = max(worst, *errors)
        for index, error in enumerate(errors):
            if not error <= tolerance:
                call = program.steps[index]
                if isinstance(call, AttentionStep):
                    return _attention(again, index, call, error)
                node, why = first_wrong_node(again, engine, index, step, values, tolerance)
                where = {} if node is None else _at(node)
                what = f"segment {call.segment}, step {index} of the program, {why}"
                return Finding("segment", what, call.segment, **where, error=error)
    cause = (
        "what the runtime asks of it is wrong (token ids, positions, cache slots, block tables)"
        if wrong_steps
        else "small errors add up"
    )
    return Finding(
        "",
        f"each step of the program, fed with right values, is right (largest error {worst:.1e}): "
        f"{cause}",
    )


def _outputs(step: SegmentStep | AttentionStep) -> tuple[str, ...]:
    return step.outputs if isinstance(step, SegmentStep) else (step.output,)


def step_errors(model: ProgramModel, step: StepInputs, values: Values) -> list[float]:
    """The error of each step of the program, every one fed with the given right values."""
    errors = [0.0] * len(model.program.steps)

    def compare(index: int, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        expected = [values[name] for name in _outputs(model.program.steps[index])]
        errors[index] = max(
            (_error(old, new, step) for old, new in zip(expected, outputs, strict=True)),
            key=lambda error: (error != error, error),  # NaN is the largest
        )
        return expected

    model.observer = compare
    try:
        model.forward(step)
    finally:
        model.observer = None
    return errors


def _error(expected: torch.Tensor, value: torch.Tensor, step: StepInputs) -> float:
    """Relative RMS error, padding tokens left out: nothing is promised for them."""
    for dim, size in enumerate(expected.shape):
        if size == len(step.input_ids) and value.shape == expected.shape:
            expected = expected.narrow(dim, 0, step.num_tokens)
            value = value.narrow(dim, 0, step.num_tokens)
            break
    return relative_rms(expected, value.cpu())


def _attention(again: Recaptured, index: int, call: AttentionStep, error: float) -> Finding:
    right = again.program.steps[index]
    assert isinstance(right, AttentionStep)
    pairs = [(f.name, getattr(call, f.name), getattr(right, f.name)) for f in fields(call)]
    changed = [
        f"{name} is {have!r} where the graph has {due!r}"
        for name, have, due in pairs
        if have != due
    ]
    what = f"attention of layer {call.layer}, step {index} of the program, gives other values"
    node = next(n for n in again.passed.graph.graph.nodes if n.name == call.output)
    what = f"{what}: {'; '.join(changed)}" if changed else what
    return Finding("attention", what, str(call.layer), **_at(node), error=error)
