"""ONNX Runtime's artifacts: the eager graphs' tokens, what they hold, and who is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from inlay import LLM, CompileOptions, Engine, SamplingParams, compile_model
from inlay.backends.artifact import MANIFEST, write_manifest
from inlay.backends.onnx.cached import MODEL
from inlay.backends.onnxruntime import backend as backend_module
from inlay.engine import build
from inlay.errors import (
    ArtifactError,
    BuildError,
    OptionError,
    UnsupportedModelError,
    VerificationError,
)
from tests.quantizable import build_quantizable
from tests.toys import build_toy

OPTIONS = CompileOptions(backend="onnxruntime", dtype="float32", block_size=16)
PROMPTS = [[5, 6, 7, 8, 9], [100], list(range(40, 61))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Two layers with biases: first, middle, tail and LM head."""
    return build(build_toy("qwen2"), tmp_path_factory.mktemp("onnxruntime") / "engine", OPTIONS)


@pytest.fixture
def copied(engine: Engine, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine.path, tmp_path / "copy"))


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine, in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_tokens_are_those_of_the_graphs_interpreted(engine: Engine) -> None:
    expected = tokens(Engine.load(engine.path, backend="eager"))
    assert tokens(engine) == expected
    assert len({token for row in expected for token in row}) > 12
    # float32, summed in another order; as on the other backends.
    assert engine.manifest["errors"]["engine"] <= 5e-6


def test_in_a_process_of_its_own_with_threads_of_its_own(engine: Engine) -> None:
    with LLM(engine, kv_cache_tokens=512, num_threads=1) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == tokens(engine)


def test_what_is_in_it(engine: Engine) -> None:
    files = [path for path in engine.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".so", ".onnx"}
    weights = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    for key in engine.artifact.program.segment_keys:
        path = engine.artifact.segment_file(key, MODEL)
        assert path.stat().st_size < weights / 10, "weights are not in it"
        onnx.checker.check_model(without_weights(path))
    target = engine.manifest["target"]
    assert target["provider"] == "CPUExecutionProvider"
    assert target["torch"] == torch.__version__


def without_weights(path: Path) -> onnx.ModelProto:
    """Weights as inputs: the checker looks for files that hold them."""
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(value)
    kept = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def test_a_second_build_converts_nothing(engine: Engine, tmp_path: Path) -> None:
    again = build(build_toy("qwen2"), tmp_path / "again", OPTIONS)
    assert again.manifest["target"]["num_converted"] == 0
    for key in again.artifact.program.segment_keys:
        ours, theirs = (one.artifact.segment_file(key, MODEL) for one in (again, engine))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("name", "quantization", "dtype"),
    [
        ("llama", "w8a8", torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "w4a16", torch.float32),
                ("llama", "w8a16", torch.float32),
                ("llama", "fp8", torch.float32),
                ("qwen3_moe", "w8a8", torch.float32),
                ("gpt_oss", "w4a16", torch.float32),
                ("gpt_oss", "w8a8", torch.float16),
                ("llama", "none", torch.float16),
            )
        ),
    ],
)
def test_quantized_and_half(
    name: str, quantization: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The build compares with the quantized graph; in float32 sums differ in order alone."""
    model = build_quantizable(name, dtype)
    options = CompileOptions(backend="onnxruntime", quantization=quantization, block_size=16)
    engine = build(model, tmp_path / "engine", options)
    if dtype == torch.float32:
        assert engine.manifest["errors"]["engine"] <= 5e-6
    assert len({token for row in tokens(engine) for token in row}) > 5


# --- what is refused -------------------------------------------------------------------------


def test_bfloat16_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    options = CompileOptions(backend="onnxruntime", dtype="bfloat16")
    with pytest.raises(OptionError, match=r"dtype 'bfloat16'.*float32.*inductor"):
        build(build_toy("llama", torch.bfloat16, layers=1), tmp_path / "engine", options)
    assert not (tmp_path / "engine").exists()


def test_an_op_that_onnx_lacks_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModelError("node odd")

    monkeypatch.setattr(backend_module, "convert_segments", refuse)
    with pytest.raises(UnsupportedModelError, match="node odd"):
        build(build_toy("llama", layers=1), tmp_path / "engine", OPTIONS)
    assert not (tmp_path / "engine").exists()


def drop_a_bias(model: onnx.ModelProto) -> None:
    add = next(n for n in model.graph.node if n.op_type == "Add" and "linear" in n.name)
    index = list(model.graph.node).index(add)
    nothing = onnx.helper.make_node("Sub", [add.input[1], add.input[1]], ["nothing"])
    model.graph.node.insert(index, nothing)  # a weight that nobody reads would be missed
    add.input[1] = "nothing"


def shift_an_epsilon(model: onnx.ModelProto) -> None:
    norm = next(n for n in model.graph.node if n.op_type == "RMSNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 1e-2


def turn_by_pairs(model: onnx.ModelProto) -> None:
    rope = next(n for n in model.graph.node if n.op_type == "RotaryEmbedding")
    next(a for a in rope.attribute if a.name == "interleaved").i = 1


@pytest.mark.parametrize("spoil", [drop_a_bias, shift_an_epsilon, turn_by_pairs])
def test_a_wrong_segment_is_refused_by_the_build(
    spoil: Callable[[onnx.ModelProto], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = backend_module.convert_segments

    def spoiled(*args: Any) -> tuple[dict[str, bytes], int]:
        models, count = convert(*args)
        key = next(iter(models))
        model = onnx.load_from_string(models[key])
        spoil(model)
        return {**models, key: model.SerializeToString()}, count

    monkeypatch.setattr(backend_module, "convert_segments", spoiled)
    with pytest.raises(VerificationError, match="onnxruntime engine"):
        build(build_toy("qwen2"), tmp_path / "engine", OPTIONS)
    assert not (tmp_path / "engine").exists()


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    imports = importlib.import_module

    def one_is_missing(name: str, *rest: Any) -> Any:
        if name == missing:
            raise ImportError(name, name=name)
        return imports(name, *rest)

    monkeypatch.setattr(importlib, "import_module", one_is_missing)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_ends_a_build_at_once(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, package)
    with pytest.raises(BuildError, match=rf"'{package}'.*pip install 'inlay\[onnxruntime\]'"):
        compile_model(build_toy("llama", layers=1), "onnxruntime", dtype="float32")


def test_loading_needs_onnxruntime_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxscript")
    Engine.load(engine.path).load_model()
    without(monkeypatch, "onnxruntime")
    told = r"'onnxruntime'.*pip install 'inlay\[onnxruntime\]'.*backend='eager'"
    with pytest.raises(ArtifactError, match=told):
        Engine.load(engine.path).load_model()


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("provider", "CUDAExecutionProvider", r"inlay\[onnxruntime-gpu\]"),
        ("onnxruntime", "99.0.1", r"pip install 'onnxruntime>=99.0.1'"),
        ("torch", "2.99.0", "inlay build MODEL -o DIR --backend onnxruntime"),
        ("machine", "aarch64", "backend='eager'"),
    ],
)
def test_an_artifact_that_cannot_run_here_says_why(
    key: str, value: str, fix: str, copied: Path
) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["target"][key] = value
    write_manifest(copied, manifest)
    with pytest.raises(ArtifactError, match=rf"(?s){value}.*{fix}"):
        Engine.load(copied).load_model()
    assert tokens(Engine.load(copied, backend="eager"))


def test_damaged_code_is_not_run(copied: Path) -> None:
    file = sorted(copied.glob(f"segments/*/{MODEL}"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="has been changed: its sha256 differs"):
        Engine.load(copied)


def test_batch_invariance_is_refused_by_name(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"batch_invariant=True.*'onnxruntime'.*inductor"):
        engine.load_model().make_batch_invariant()
