"""How a build is checked where there is no GPU to run its engines: step by step by their ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import Checkable
from inlay.backends.eager.backend import EagerBackend
from inlay.backends.graph_json import graph_from_json
from inlay.backends.model import SegmentCall
from inlay.backends.program import SegmentStep
from inlay.backends.tensorrt.engines import MODEL
from inlay.backends.tensorrt.library import is_installed
from inlay.backends.tensorrt.self_check import disagreement, step_errors, tolerance
from inlay.backends.tensorrt.wide import wide, widen_model
from inlay.errors import VerificationError

if TYPE_CHECKING:
    import onnx

CPU = torch.device("cpu")
NOT_RUN = "the engines themselves have not run: there was no GPU"
GRAPHS = "the artifact's graphs, run by the eager reference"
ROUNDED_ACTIVATIONS = 2e-3
"""Allowed error of a step where activations are rounded to 8 bits. Sums of another order put one in
some ten thousand on the other side of a tie, which costs 1/127 of the largest each; a scale that is
off by a hundredth costs five times as much."""


def stand_in(artifact: Artifact) -> Checkable:
    """The graphs, interpreted, once the engines' ONNX was found to compute what they do.

    Raises VerificationError where it does not. Without ONNX Runtime the manifest says that it was
    not checked.
    """
    graphs = EagerBackend().load(artifact)
    if not is_installed("onnxruntime"):
        why = "their ONNX was not checked: onnxruntime is not installed"
        return Checkable(graphs, f"{GRAPHS}; {why}; {NOT_RUN}", is_engine=False)
    on_inductor = artifact.manifest["target"]["on_inductor"]

    def call_of(index: int) -> SegmentCall | None:
        step = artifact.program.steps[index]
        assert isinstance(step, SegmentStep)
        return None if step.segment in on_inductor else _session(artifact, step)

    errors, allowed = step_errors(artifact, call_of, CPU, in_float32=True), _allowed(artifact)
    if told := disagreement(artifact, errors, allowed):
        raise VerificationError(f"the ONNX that engines were built of is wrong: {told}")
    what = (
        f"{GRAPHS}; the engines' ONNX, run in float32 by ONNX Runtime, agrees with them in each of "
        f"{len(errors)} steps within {max(errors.values(), default=0.0):.1e}, allowed is "
        f"{allowed:.1e}; {NOT_RUN}"
    )
    return Checkable(graphs, what, is_engine=False)


def _allowed(artifact: Artifact) -> float:
    """Of a step's relative RMS error."""
    graphs = (artifact.json(f"segments/{key}/graph.json") for key in artifact.program.segment_keys)
    targets = {node.target for gm in map(graph_from_json, graphs) for node in gm.graph.nodes}
    is_rounded = torch.ops.inlay.quantize_static.default in targets
    return ROUNDED_ACTIVATIONS if is_rounded else tolerance(torch.float32)


def _session(artifact: Artifact, step: SegmentStep) -> SegmentCall:
    import onnx

    from inlay.backends.onnx.convert import fill_weights
    from inlay.backends.onnxruntime.sessions import CPU as PROVIDER
    from inlay.backends.onnxruntime.sessions import SegmentSession

    reader = WeightReader(artifact)
    names = zip(_weight_names(artifact, step.segment), step.weights, strict=True)
    tensors = {name: wide(reader.get(weight)) for name, weight in names}
    model = load_model(artifact, step)
    widen_model(model)
    # torch has no such tensors to give.
    int4 = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    fill_weights(model, tensors.__getitem__, int4)
    given = {name: tensor for name, tensor in tensors.items() if name not in int4}
    # Q/DQ as they are: what ONNX Runtime would make of them rounds elsewhere, or fails.
    entries = {"session.disable_quant_qdq": "1"}
    return SegmentSession(model.SerializeToString(), given, PROVIDER, CPU, entries)


def load_model(artifact: Artifact, step: SegmentStep) -> onnx.ModelProto:
    import onnx

    return onnx.load_from_string(artifact.segment_file(step.segment, MODEL).read_bytes())


def _weight_names(artifact: Artifact, key: str) -> list[str]:
    nodes = graph_from_json(artifact.json(f"segments/{key}/graph.json")).graph.nodes
    return [node.name for node in nodes if node.meta.get("kind") == "weight"]
