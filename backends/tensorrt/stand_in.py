"""What a build is compared with Hugging Face by where there is no GPU to run its engines."""

from __future__ import annotations

import torch

from inlay.backends.artifact import Artifact, WeightReader
from inlay.backends.base import Checkable
from inlay.backends.eager.backend import EagerBackend
from inlay.backends.graph_json import graph_from_json
from inlay.backends.model import ProgramModel, SegmentCall
from inlay.backends.program import SegmentStep
from inlay.backends.tensorrt.engines import MODEL
from inlay.backends.tensorrt.library import is_installed
from inlay.backends.tensorrt.steps import model_of_steps, segment_steps

NOT_RUN = "the engines themselves have not run: there was no GPU"


def stand_in(artifact: Artifact) -> Checkable:
    """The engines' ONNX run by ONNX Runtime, where that can; else the graphs, interpreted."""
    reason = _why_not(artifact)
    if reason:
        what = f"the engines' graphs, run by the eager reference ({reason}); {NOT_RUN}"
        return Checkable(EagerBackend().load(artifact), what, is_engine=False)
    what = f"the engines' ONNX, run by ONNX Runtime; {NOT_RUN}"
    return Checkable(_by_onnx_runtime(artifact), what, is_engine=False)


def _why_not(artifact: Artifact) -> str:
    if not is_installed("onnxruntime"):
        return "onnxruntime is not installed"
    if artifact.program.dtype == "bfloat16":
        return "ONNX Runtime's CPU provider has no bfloat16 product"
    if artifact.manifest["target"]["on_inductor"]:
        return "Inductor runs some of them"
    return ""


def _by_onnx_runtime(artifact: Artifact) -> ProgramModel:
    device = torch.device("cpu")
    calls = {
        index: _session(artifact, step, device) for index, step in segment_steps(artifact.program)
    }
    return model_of_steps(artifact, calls, {}, device)


def _session(artifact: Artifact, step: SegmentStep, device: torch.device) -> SegmentCall:
    import onnx

    from inlay.backends.onnx.convert import fill_weights
    from inlay.backends.onnxruntime.sessions import CPU, SegmentSession

    reader = WeightReader(artifact)
    names = zip(_weight_names(artifact, step.segment), step.weights, strict=True)
    tensors = {name: reader.get(weight) for name, weight in names}
    data = artifact.segment_file(step.segment, MODEL).read_bytes()
    model = onnx.load_from_string(data)
    if any(tensor.data_type == onnx.TensorProto.INT4 for tensor in model.graph.initializer):
        # torch has no such tensors to give.
        fill_weights(model, tensors.__getitem__)
        data, tensors = model.SerializeToString(), {}
    # Q/DQ as they are: what ONNX Runtime would make of them rounds elsewhere, or fails.
    return SegmentSession(data, tensors, CPU, device, {"session.disable_quant_qdq": "1"})


def _weight_names(artifact: Artifact, key: str) -> list[str]:
    nodes = graph_from_json(artifact.json(f"segments/{key}/graph.json")).graph.nodes
    return [node.name for node in nodes if node.meta.get("kind") == "weight"]
