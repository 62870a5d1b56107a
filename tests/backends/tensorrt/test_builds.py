"""Engines that TensorRT-RTX builds without a GPU: what they hold, and what is said of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.backends.tensorrt.backend import TensorRTBackend
from inlay.engine import Engine, build
from inlay.errors import ArtifactError, UnsupportedModelError
from inlay.lowering.options import CompileOptions
from tests.quantizable import build_quantizable
from tests.toys import build_toy

pytest.importorskip("tensorrt_rtx", reason="needs inlay[tensorrt-rtx]")

TEXTS = [{"token_ids": torch.randint(0, 128, (48,)).tolist()} for _ in range(4)]
LIMITS = {"max_num_tokens": 128, "max_num_seqs": 8}
STATIC = {"activation_scales": "static", "calibration": TEXTS, "num_samples": 4}
DTYPES = {"float32": "Float", "float16": "Half", "bfloat16": "BFloat16"}
"""Our names of types -> the library's, in what it says of layers."""

FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "w8a8": ({"format": "w8a8", "lm_head": "none", **STATIC}, "auto", "Int8"),
    "w8a16": ({"format": "w8a16"}, "auto", "Int8"),
    "w4a16": ({"format": "w4a16", "lm_head": "none"}, "auto", "Int4"),
    "fp8": ({"format": "fp8", **STATIC}, "sm89", "FP8"),
}
"""Format -> what is asked for, target, the type of the weights in the engines."""


def build_engine(path: Path, name: str, dtype: str, **options: Any) -> Engine:
    given = CompileOptions(backend="tensorrt", dtype=dtype, **LIMITS, **options)
    return build(build_toy(name), path / "engine", given)


def report_of(engine: Engine) -> dict[str, Any]:
    return engine.artifact.json("segments/engines.json")


def layers_of(engine: Engine) -> list[dict[str, Any]]:
    return [layer for one in report_of(engine)["engines"] for layer in one["layers"]]


def products_of(engine: Engine) -> list[dict[str, Any]]:
    """Layers that multiply with a weight of the model."""
    return [one for one in layers_of(engine) if any("linear" in node for node in one["nodes"])]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return build_engine(tmp_path_factory.mktemp("llama"), "llama", "float16")


def test_the_manifest_says_what_was_built(llama: Engine) -> None:
    target = llama.manifest["target"]
    assert target["library"] == "tensorrt_rtx"
    assert target["target"] == "auto"
    assert target["version"].count(".") == 3
    assert target["on_inductor"] == {}
    checked = llama.manifest["checked"]
    assert "ONNX, run in float32 by ONNX Runtime, agrees with them in each of 4 steps" in checked
    assert checked.endswith("the engines themselves have not run: there was no GPU")
    assert "engine" not in llama.manifest["errors"]
    assert llama.manifest["errors"]["stand_in"] > 0


def test_each_step_has_an_engine_of_its_own(llama: Engine) -> None:
    steps = llama.artifact.program.segment_steps
    plans = TensorRTBackend().weight_files(llama.path)
    assert len(plans) == len(steps) == llama.manifest["target"]["engines"]
    assert sum(plan.stat().st_size for plan in plans) == llama.manifest["target"]["plan_bytes"]


def test_the_report_says_what_became_of_the_layers(llama: Engine) -> None:
    report = report_of(llama)
    assert report["peak_bytes"] > 0
    assert report["estimated_bytes"] > 0
    for one in report["engines"]:
        # Two profiles: each layer of the network would otherwise be there twice.
        assert 0 < len(one["layers"]) < 2 * one["num_nodes"]
        assert one["seconds"] > 0
        assert one["plan_bytes"] > 0
    fused = [layer["nodes"] for layer in layers_of(llama) if len(layer["nodes"]) > 1]
    assert any({node.split(".")[1] for node in nodes} & {"Sigmoid", "Mul"} for nodes in fused)
    assert all("Half" in layer["constants"] for layer in products_of(llama))


def test_without_a_gpu_loading_says_so_and_eager_runs(llama: Engine, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(llama.path, copy)
    with pytest.raises(ArtifactError, match="need a GPU"):
        Engine.load(copy).load_model()
    assert Engine.load(copy, backend="eager").load_model().limits.max_num_seqs == 8


def test_refit_builds_the_plans_again(llama: Engine, tmp_path: Path) -> None:
    pruned = llama.prune(tmp_path / "pruned")
    assert not TensorRTBackend().weight_files(pruned.path)
    assert list(pruned.path.glob("segments/*/tensorrt.onnx"))
    again = pruned.refit(build_toy("llama"), tmp_path / "again")
    names = [plan.name for plan in TensorRTBackend().weight_files(again.path)]
    assert names == [plan.name for plan in TensorRTBackend().weight_files(llama.path)]
    layers = [one["layers"] for one in report_of(again)["engines"]]
    assert [len(one) for one in layers] == [
        len(one["layers"]) for one in report_of(llama)["engines"]
    ]


@pytest.mark.parametrize("format_", ["w8a8", "fp8"])
def test_dynamic_scales_of_some_layers_are_refused_with_their_lines(
    tmp_path: Path, format_: str
) -> None:
    """Which ones the graph alone can say; where it is all of them, see test_early_refusals.py."""
    given = {"format": format_, "ignore": ["*self_attn*", "*gate_proj", "*up_proj", "lm_head"]}
    with pytest.raises(UnsupportedModelError) as refused:
        build_engine(tmp_path, "llama", "float16", quantization=given, target="sm89")
    assert f"quantization='{format_},activation_scales=static,calibration=FILE'" in str(
        refused.value
    )
    assert "modeling_llama.py" in str(refused.value)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    "format_",
    [
        pytest.param("w8a8"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS if name != "w8a8"),
    ],
)
def test_quantized_weights_stay_so(tmp_path: Path, format_: str) -> None:
    quantization, target, expected = FORMATS[format_]
    engine = build_engine(tmp_path, "llama", "float16", quantization=quantization, target=target)
    narrow = [one for one in products_of(engine) if expected in one["constants"]]
    products = 2 * 4 * 2  # of two layers four products each, in two profiles
    assert len(narrow) >= products - 4  # two may be one kernel
    if format_ in ("w8a8", "fp8"):
        assert all(expected in one["inputs"] for one in narrow)
    assert "by ONNX Runtime, agrees" in engine.manifest["checked"]
    assert engine.manifest["target"]["target"] == target


DENSE = ["qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2"]
EXPERTS = ["qwen3_moe", "mixtral"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*DENSE, *EXPERTS, "gemma3n_text"])
def test_architectures(tmp_path: Path, name: str, dtype: str) -> None:
    engine = build_engine(tmp_path, name, dtype)
    assert engine.manifest["target"]["engines"] == len(engine.artifact.program.segment_steps)
    read = {kind for layer in products_of(engine) for kind in layer["constants"]}
    assert DTYPES[dtype] in read
    assert not read & ({*DTYPES.values(), "Int8", "Int4", "FP8"} - {DTYPES[dtype], "Float"})


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("format_", FORMATS)
def test_architectures_quantized(tmp_path: Path, name: str, format_: str) -> None:
    quantization, target, expected = FORMATS[format_]
    engine = build_engine(tmp_path, name, "bfloat16", quantization=quantization, target=target)
    assert any(expected in one["constants"] for one in layers_of(engine))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("format_", ["w8a16", "w4a16"])
def test_experts_quantized(tmp_path: Path, name: str, format_: str) -> None:
    """All of an expert's matrices narrow in the engines."""
    model = build_quantizable(name, torch.bfloat16)
    given = CompileOptions(backend="tensorrt", quantization=f"{format_},lm_head=none", **LIMITS)
    engine = build(model, tmp_path / "engine", given)
    assert "agrees with them in each of" in engine.manifest["checked"]
    experts = [one for one in layers_of(engine) if any("experts" in node for node in one["nodes"])]
    narrow = [one for one in experts if FORMATS[format_][2] in one["constants"]]
    assert len(narrow) >= 2 * 2 * 2  # up and down, of two layers, in two profiles


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"])
def test_targets(tmp_path: Path, target: str) -> None:
    engine = build_engine(tmp_path, "llama", "float16", target=target)
    assert engine.manifest["target"]["target"] == target
