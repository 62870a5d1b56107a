"""The check of a build without a GPU: it can tell an ONNX that computes something else, whatever
the dtype and the quantization, and says so where it could not check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.backends.artifact import Artifact
from inlay.backends.graph_json import graph_from_json
from inlay.backends.onnx.convert import segment_to_onnx
from inlay.backends.program import SegmentStep
from inlay.backends.tensorrt import stand_in as stand_in_module
from inlay.backends.tensorrt.engines import MODEL
from inlay.backends.tensorrt.stand_in import ROUNDED_ACTIVATIONS, load_model, stand_in
from inlay.engine import build
from inlay.errors import VerificationError
from inlay.lowering.options import CompileOptions
from tests.quantizable import build_quantizable

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TEXTS = [{"token_ids": list(range(begin, begin + 64))} for begin in (0, 20, 40)]
STATIC = {
    "format": "w8a8", "lm_head": "w8a16", "activation_scales": "static", "calibration": TEXTS,
}  # fmt: skip
CASES: dict[str, tuple[str, torch.dtype, Any]] = {
    "plain": ("gemma2", torch.bfloat16, "none"),
    "w8a16": ("llama", torch.bfloat16, "w8a16"),
    "w4a16": ("llama", torch.bfloat16, "w4a16"),
    "w8a8": ("llama", torch.bfloat16, STATIC),
    "half": ("llama", torch.float16, STATIC),
    "experts": ("qwen3_moe", torch.bfloat16, "w4a16"),
    "wide experts": ("mixtral", torch.bfloat16, "w8a16"),
}


SLOW = ("w8a16", "half", "wide experts", "experts")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """With the ONNX that engines would be built of."""
    name, dtype, quantization = CASES[request.param]
    path = tmp_path_factory.mktemp("stand-in") / "engine"
    options = CompileOptions(backend="eager", verify="capture", quantization=quantization)
    artifact = build(build_quantizable(name, dtype), path, options).artifact
    artifact.manifest["target"] = {"on_inductor": {}}
    for key in artifact.program.segment_keys:
        graph = graph_from_json(artifact.json(f"segments/{key}/graph.json"))
        model = segment_to_onnx(graph, "tensorrt")
        artifact.segment_file(key, MODEL).write_bytes(model.SerializeToString())
    return artifact


def test_a_right_one_passes_and_is_said_to_be(artifact: Artifact) -> None:
    checked = stand_in(artifact)
    assert not checked.is_engine
    count = len(artifact.program.segment_steps)
    assert f"in float32 by ONNX Runtime, agrees with them in each of {count} steps" in checked.what
    assert "have not run" in checked.what


def first(model: Any, *kinds: str) -> Any:
    return next((node for node in model.graph.node if node.op_type in kinds), None)


def scale_by(node: Any, model: Any, index: int, factor: float) -> None:
    """One input of a node is a hundredth too large."""
    nodes = [
        onnx.helper.make_node("Constant", [], ["factor"], value_float=factor),
        onnx.helper.make_node("CastLike", ["factor", node.input[index]], ["like"]),
        onnx.helper.make_node("Mul", [node.input[index], "like"], ["spoiled"]),
    ]
    at = list(model.graph.node).index(node)
    for offset, one in enumerate(nodes):
        model.graph.node.insert(at + offset, one)
    node.input[index] = "spoiled"


def test_a_damaged_scale_or_weight_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times what is allowed where activations are rounded, two hundred times elsewhere."""
    spoiled: list[str] = []

    def spoil(artifact: Artifact, step: SegmentStep) -> Any:
        model = load_model(artifact, step)
        node = first(model, "DequantizeLinear") or first(model, "RMSNormalization")
        if node is not None and not spoiled:
            spoiled.append(step.segment)
            scale_by(node, model, 1, 1.01)
        return model

    monkeypatch.setattr(stand_in_module, "load_model", spoil)
    with pytest.raises(VerificationError, match=r"1 of \d steps .* step \d+, segment \w+: off by"):
        stand_in(artifact)
    assert spoiled
    assert 5 * ROUNDED_ACTIVATIONS <= 0.01


def test_without_onnx_runtime_it_is_said_to_be_unchecked(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in_module, "is_installed", lambda name: False)
    assert "ONNX was not checked: onnxruntime is not installed" in stand_in(artifact).what


def test_what_inductor_runs_has_no_onnx(artifact: Artifact, tmp_path: Path) -> None:
    key = artifact.program.segment_keys[0]
    count = sum(step.segment != key for step in artifact.program.segment_steps)
    artifact.manifest["target"] = {"on_inductor": {key: ["a reason"]}}
    kept = artifact.segment_file(key, MODEL).rename(tmp_path / MODEL)
    try:
        assert f"in each of {count} steps" in stand_in(artifact).what
    finally:
        artifact.manifest["target"] = {"on_inductor": {}}
        kept.rename(artifact.segment_file(key, MODEL))
