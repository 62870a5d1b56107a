"""What a backend cannot take is refused before minutes are spent: before weights are read where the
options or the config say it, before capture always."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inlay import compile_model
from inlay.backends.base import Known
from inlay.backends.tensorrt import library
from inlay.backends.tensorrt.backend import TensorRTBackend
from inlay.errors import BuildError, InlayError, OptionError, UnsupportedModelError
from inlay.lowering import loading, pipeline
from inlay.lowering.loading import load_source
from inlay.lowering.quantization import sure_schemes
from inlay.passes.quantize.config import QuantizationConfig, Scheme
from tests.quantizable import build_quantizable
from tests.toys import build_toy

needs_rtx = pytest.mark.skipif(
    not library.is_installed("tensorrt_rtx"), reason="needs inlay[tensorrt-rtx]"
)
TEXTS = [{"token_ids": list(range(40))}]
STATIC = {"activation_scales": "static", "calibration": TEXTS}


class ReachedError(InlayError):
    """Further than a build should have come."""


@pytest.fixture(autouse=True)
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(pipeline, "capture", reached)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(loading, "_load", reached)


def config_of(path: Path, dtype: str = "bfloat16", **entries: Any) -> Path:
    """A checkpoint of which only the config is there."""
    config = build_toy("llama").config
    config.dtype = getattr(torch, dtype)
    for name, value in entries.items():
        setattr(config, name, value)
    config.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_gpu_here() -> None:
    assert not torch.cuda.is_available(), "bfloat16 is possible on a GPU"


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_bfloat16_of_onnx_runtime_by_option_or_config(tmp_path: Path, asked: str) -> None:
    pytest.importorskip("onnxruntime")
    path = config_of(tmp_path / "model", "bfloat16" if asked == "auto" else "float32")
    with pytest.raises(OptionError, match="dtype 'bfloat16' is not possible"):
        compile_model(path, "onnxruntime", dtype=asked)
    with pytest.raises(ReachedError):
        compile_model(path, "onnxruntime", dtype="float16")


def test_bfloat16_of_a_model_in_memory() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(OptionError, match="dtype 'bfloat16' is not possible"):
        compile_model(build_toy("llama", torch.bfloat16), "onnxruntime")


@pytest.mark.usefixtures("no_weights")
def test_a_missing_calibration_file(tmp_path: Path) -> None:
    path = config_of(tmp_path / "model")
    with pytest.raises(OptionError, match=r"'no/such.jsonl' cannot be read: it is no file"):
        compile_model(path, "eager", quantization="w4a16,method=gptq,calibration=no/such.jsonl")


@pytest.mark.usefixtures("no_weights")
def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", lambda name: False)
    with pytest.raises(BuildError, match=r"inlay\[tensorrt-rtx\]"):
        compile_model(config_of(tmp_path / "model"), "tensorrt")
    with pytest.raises(BuildError, match="needs tensorrt: "):
        compile_model(build_toy("llama"), "tensorrt", library="tensorrt")


@needs_rtx
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ("w8a8", "quantization='w8a8,activation_scales=static,calibration=FILE'"),
        ("fp8", "quantization='fp8,activation_scales=static,calibration=FILE'"),
        ("w4a16,symmetric=false", "leave symmetric=False out"),
        ({"format": "w8a8", "activation_symmetric": False, **STATIC}, "activation_symmetric=False"),
        ({"format": "fp8", **STATIC}, "give target='sm89'"),
    ],
)
def test_quantization_by_option(tmp_path: Path, quantization: Any, told: str) -> None:
    path = config_of(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=told):
        compile_model(path, "tensorrt", quantization=quantization)
    with pytest.raises(ReachedError):
        compile_model(path, "tensorrt", quantization=quantization, fallback="inductor")


@needs_rtx
@pytest.mark.usefixtures("no_weights")
def test_bfloat16_for_turing(tmp_path: Path) -> None:
    path = config_of(tmp_path / "model", "bfloat16")
    with pytest.raises(UnsupportedModelError, match=r"'sm75' \(Turing\) has no bfloat16.*float16"):
        compile_model(path, "tensorrt", target="sm75")
    with pytest.raises(ReachedError):
        compile_model(path, "tensorrt", target="sm80")


@needs_rtx
@pytest.mark.parametrize(
    ("quantization", "is_refused"),
    [
        ({"format": "w8a8", "lm_head": "w8a8", **STATIC}, True),  # the LM head's are dynamic
        ({"format": "w8a8", **STATIC}, False),
        ({"format": "w8a8", "lm_head": "w8a16", **STATIC}, False),
        ({"format": "w8a8", "ignore": "lm_head", **STATIC}, False),
        ({"format": "w8a8", "ignore": "lm_head"}, True),
        # Nothing is left but, for all that is known, routers: the graph will say.
        ({"format": "w8a8", "ignore": ["*self_attn*", "*mlp*", "lm_head"]}, False),
    ],
)
def test_quantization_of_a_loaded_model(quantization: Any, is_refused: bool) -> None:
    expected: type[Exception] = UnsupportedModelError if is_refused else ReachedError
    with pytest.raises(expected):
        compile_model(
            build_quantizable("llama", torch.float32), "tensorrt", quantization=quantization
        )


def compressed(bits: int, kind: str, dynamic: bool, strategy: str = "channel") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    inputs = {"num_bits": 8, "type": kind, "dynamic": dynamic, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    layout = "float-quantized" if kind == "float" else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
    }


@needs_rtx
@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (compressed(8, "int", True), "take a checkpoint with static scales, .*quantization='w8a8"),
        (compressed(8, "float", True), "take a checkpoint with static scales, .*='fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "static scales, .*='fp8"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            "static scales, .*='fp8",
        ),
        (compressed(8, "int", False), ""),
        (compressed(8, "int", True, "group"), ""),  # by groups: not rounded by any op of ours
        (compressed(4, "int", True), ""),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ""),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ""),
    ],
)
def test_dynamic_scales_of_a_checkpoint(tmp_path: Path, facts: dict[str, Any], told: str) -> None:
    path = config_of(tmp_path / "model", quantization_config=facts)
    with pytest.raises(InlayError) as raised:
        compile_model(path, "tensorrt")
    if not told:
        assert raised.type is ReachedError
        return
    assert raised.type is UnsupportedModelError
    raised.match(told)


@needs_rtx
def test_each_reason_is_told_once() -> None:
    dynamic = Scheme("int8", "int8")
    known = Known(schemes=(dynamic, Scheme("int4", symmetric=False)))
    with pytest.raises(UnsupportedModelError) as refused:
        TensorRTBackend().check_early(known)
    text = str(refused.value)
    assert text.count("found at run time") == text.count("zero points") == 1


@pytest.mark.parametrize("vocab_size", [256, 257])
def test_a_head_that_is_left_out_is_no_reason(vocab_size: int) -> None:
    """Sizes that are no multiples of 16 stay as they are (rewrite.py): GPT-2's vocabulary."""
    config = QuantizationConfig(format="w8a8", calibration=TEXTS, activation_scales="static")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    found = sure_schemes(config, load_source(model, "float32"))
    assert (config.head in found) is (vocab_size == 256)
    assert config.layers in found
    assert sure_schemes(replace(config, ignore=("*q_proj",)), load_source(model, "float32")) == ()
