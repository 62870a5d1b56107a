"""Quantized checkpoints that are damaged, contradict themselves or are of other formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inlay import compile_model
from inlay.errors import InlayError, ModelLoadError, OptionError, UnsupportedModelError
from inlay.lowering.loading import load_source
from tests.quantized_checkpoints import (
    Format,
    awq,
    blocks,
    edit_config,
    fp8,
    gptq,
    modelopt,
    packed,
    w8a8,
    write,
)
from tests.toys import build_toy

Tensors = dict[str, Tensor]
MODULE = "model.layers.0.self_attn.q_proj"
TOKEN = {"strategy": "token"}


def written(made: Format, folder: Path, **options: Any) -> Path:
    model = build_toy("llama", layers=1, intermediate_size=128)
    return write(model, folder, *made, **options).folder


def drop(part: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"{MODULE}.{part}")


def put(part: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(f"{MODULE}.{part}", tensor)


ONE = torch.ones(1)
DAMAGE: dict[str, tuple[Format, Callable[[Tensors], None], str]] = {
    "gptq, no zeros": (gptq(), drop("qzeros"), f"module {MODULE} .* lacks the tensors qzeros"),
    "gptq, no numbers": (gptq(), drop("qweight"), "lacks the tensors qweight; it has g_idx"),
    "gptq, no order": (gptq(desc_act=True), drop("g_idx"), "g_idx is missing, and desc_act is set"),
    "gptq, groups": (
        gptq(),
        put("g_idx", torch.full((64,), 2, dtype=torch.int32)),
        "q_proj.g_idx names groups that scales does not have",
    ),
    "gptq, scales": (
        gptq(),
        put("scales", torch.ones(2, 32).half()),
        rf"tensor {MODULE}.scales is \[2, 32\], expected \[2, 64\]",
    ),
    "awq, groups": (
        awq(),
        lambda tensors: (
            put("scales", torch.ones(4, 64).half())(tensors),
            put("qzeros", torch.ones(4, 8, dtype=torch.int32))(tensors),
        ),
        r"scales is \[4, 64\], expected \[2, 64\]",
    ),
    "one too many": (
        w8a8(TOKEN),
        put("weight_global_scale", ONE),
        "has tensors that this format does not know: weight_global_scale; known are bias,",
    ),
    "no scale": (w8a8(TOKEN), drop("weight_scale"), "lacks the tensors weight_scale"),
    "no shape": (packed(), drop("weight_shape"), "q_proj.weight_shape is missing"),
    "no zero points": (packed(symmetric=False), drop("weight_zero_point"), "zero_point is missing"),
    "scale of integers": (
        w8a8(TOKEN),
        put("weight_scale", torch.ones(64, 1, dtype=torch.int32)),
        "weight_scale is torch.int32, expected float32, bfloat16, float16",
    ),
    "numbers of another type": (
        fp8("channel", TOKEN),
        put("weight", torch.ones(64, 64, dtype=torch.int8)),
        "q_proj.weight is torch.int8, expected float8_e4m3fn",
    ),
    "not quantized really": (
        fp8("channel", TOKEN),
        put("weight", torch.ones(64, 64)),
        "q_proj.weight is torch.float32, expected float8_e4m3fn",
    ),
    "no input scale": (
        w8a8({"strategy": "tensor", "dynamic": False}, 0.1),
        drop("input_scale"),
        "q_proj.input_scale is missing",
    ),
    "blocks": (
        blocks(),
        put("weight_scale_inv", torch.ones(2, 1)),
        r"weight_scale_inv is \[2, 1\], expected \[1, 1\]",
    ),
    "two scales for all": (modelopt(), put("weight_scale", torch.ones(2)), "expected one number"),
    "numbers that are none": (
        fp8("channel", TOKEN),
        put("weight_scale", torch.full((64, 1), float("nan"))),
        f"holds NaN or infinity in {MODULE}.weight",
    ),
    "gptq, words that are none": (
        gptq(),
        put("qweight", torch.ones(8, 64)),
        "q_proj.qweight is torch.float32, expected int32",
    ),
    "gptq, zeros that are no words": (
        gptq(),
        put("qzeros", torch.ones(2, 8)),
        "q_proj.qzeros is torch.float32, expected int32",
    ),
    "gptq, a scale of integers": (
        gptq(),
        put("scales", torch.ones(2, 64, dtype=torch.int32)),
        "q_proj.scales is torch.int32, expected float32",
    ),
    "gptq, words in a row": (
        gptq(),
        put("qweight", torch.ones(512, dtype=torch.int32)),
        r"q_proj.qweight is \[512\], expected two dimensions",
    ),
    "awq, words of another type": (
        awq(),
        put("qweight", torch.ones(64, 8, dtype=torch.int64)),
        "q_proj.qweight is torch.int64, expected int32",
    ),
    "packed words that are none": (
        packed(),
        put("weight_packed", torch.ones(64, 8)),
        "q_proj.weight_packed is torch.float32, expected int32",
    ),
    "a shape of one": (
        packed(),
        put("weight_shape", torch.tensor([64])),
        r"q_proj.weight_shape is \[1\], expected \[2\]",
    ),
    "an input scale of zero": (
        w8a8({"strategy": "tensor", "dynamic": False}, 0.1),
        put("input_scale", torch.zeros(1)),
        "q_proj.input_scale holds 0: a scale must be above 0 and finite",
    ),
    "an input scale below zero": (
        modelopt(),
        put("input_scale", torch.tensor(-0.01)),
        "q_proj.input_scale holds -0.01: a scale must be above 0",
    ),
    "another width": (
        awq(),
        lambda tensors: (
            put("qweight", torch.ones(32, 8, dtype=torch.int32))(tensors),
            put("scales", torch.ones(1, 64).half())(tensors),
            put("qzeros", torch.ones(1, 8, dtype=torch.int32))(tensors),
        ),
        f"wrong shapes .*{MODULE}.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    made, spoil, message = DAMAGE[damage]
    folder = written(made, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        load_source(folder, "float32")


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **changes}


COMPRESSED = packed()[1]
GROUP = COMPRESSED["config_groups"]["group_0"]
SETTINGS: dict[str, tuple[Any, str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        r"quantized with 'bitsandbytes' \(quantization_config\), which is not supported; supported "
        r"are compressed-tensors .* gptq .* awq .* modelopt",
    ),
    "hqq": ({"quant_method": "hqq"}, "with 'hqq'"),
    "mxfp4": ({"quant_method": "mxfp4"}, "with 'mxfp4'"),
    "gptq 3 bits": (changed(gptq()[1], bits=3), r"gptq bits 3 are not supported, allowed are 4, 8"),
    "gptq marlin": (changed(gptq()[1], checkpoint_format="marlin"), "gptq format 'marlin'"),
    "awq gemv": (changed(awq()[1], version="GEMV"), "awq version 'gemv' are not supported"),
    "nvfp4": (changed(modelopt()[1], quant_algo="NVFP4"), "quant_algo 'NVFP4' are not supported"),
    "fp4 experts": (changed(blocks()[1], expert_dtype="fp4"), "experts of type 'fp4'"),
    "rotations": (changed(COMPRESSED, transform_config={"R1": {}}), "with a transform_config"),
    "no groups": (changed(COMPRESSED, config_groups={}), "without config_groups"),
    "a layout": (changed(COMPRESSED, format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    "2 bits": (
        changed(COMPRESSED, config_groups={"a": {**GROUP, "weights": {"num_bits": 2}}}),
        "weights of '2-bit int' are not supported",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_other_formats_are_refused_by_name(case: str, tmp_path: Path) -> None:
    config, message = SETTINGS[case]
    build_toy("llama", layers=1).config.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=config)  # refused before the weights are read
    with pytest.raises(UnsupportedModelError, match=message):
        load_source(tmp_path, "auto")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ignored": (changed(COMPRESSED, ignore=["re:.*q_proj"]), f"module {MODULE} holds quantized"),
    "no target": (
        changed(COMPRESSED, config_groups={"a": {**GROUP, "targets": ["lm_head"]}}),
        "groups and ignore list say that it has none",
    ),
    "another format": (gptq()[1], "none of its tensors is"),
    "bad group": (
        changed(COMPRESSED, config_groups={"a": {**GROUP, "weights": 3}}),
        "quantization_config cannot be read",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_that_is_another_checkpoints(case: str, tmp_path: Path) -> None:
    config, message = CONTRADICTIONS[case]
    folder = written(packed(), tmp_path)
    edit_config(folder, quantization_config=config)
    with pytest.raises(InlayError, match=message):
        load_source(folder, "float32")


def test_groups_of_settings_and_what_they_leave_out(tmp_path: Path) -> None:
    """Two groups: a pattern goes before the class; gate_proj and up_proj are as they are."""
    four, config = packed()
    eight, _ = packed(8, -1)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": ["re:.*self_attn.*"], "weights": weights}
    config = changed(config, config_groups={"a": GROUP, "b": group}, ignore=["re:.*gate_proj"])

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        return (eight if "self_attn" in name else four)(name, weight)

    skip = r"embed|lm_head|gate_proj|up_proj"
    source = load_source(written((pack, config), tmp_path, skip=skip), "float32")
    assert source.stored is not None
    kinds = {name: scheme.weight for name, scheme in source.stored.schemes.items()}
    prefix = "model.layers.0"
    attention = {f"{prefix}.self_attn.{part}_proj.weight": "int8" for part in "qkvo"}
    assert kinds == {**attention, f"{prefix}.mlp.down_proj.weight": "int4"}


def test_modelopt_by_its_own_file_and_its_cache_scales(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"model.layers.0.self_attn.{one}_proj.{one}_scale": ONE.clone() for one in "kv"}
    folder = written((modelopt()[0], None), tmp_path, extra=extra)  # type: ignore[arg-type]
    inner = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    facts = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": inner}
    (folder / "hf_quant_config.json").write_text(json.dumps(facts))
    source = load_source(folder, "float32")
    assert source.stored is not None
    assert len(source.stored.schemes) == 7
    assert not any("k_scale" in name for name in source.stored.given)
    assert caplog.text.count("scales of a narrow KV cache") == 1
    assert "no use for" not in caplog.text


def test_what_is_done_otherwise_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_source(written(fp8("channel", {"strategy": "tensor"}), tmp_path / "a"), "float32")
    assert caplog.text.count("each token has its own") == 1
    caplog.clear()
    pack, config = packed()
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    groups = {"a": {**GROUP, "input_activations": inputs}}
    folder = written((pack, changed(config, config_groups=groups)), tmp_path / "b")
    source = load_source(folder, "float32")
    assert {scheme.activation for scheme in source.stored.schemes.values()} == {"none"}  # type: ignore[union-attr]
    assert caplog.text.count("8-bit int activations of int4 groups of 32 weights") == 1
    caplog.clear()
    load_source(written(gptq(group_size=16), tmp_path / "c"), "float32")
    assert "7 weights run dequantized" in caplog.text
    assert "16 inputs share a scale, kernels take 32, 64, 128" in caplog.text


def test_a_model_whose_weights_lie_transposed(tmp_path: Path) -> None:
    model = build_toy("gpt2", layers=1)
    pack, config = gptq(group_size=-1)

    def transposed(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        tensors, meant = pack(name, weight.t())
        return tensors, meant.t().contiguous()

    skip = r"wte|wpe|lm_head|c_attn|c_fc|mlp"  # c_proj of attention is square
    folder = write(model, tmp_path, transposed, config, skip=skip).folder
    with pytest.raises(UnsupportedModelError, match=r"attn\.c_proj\.weight is a Conv1D"):
        load_source(folder, "float32")


def test_quantizing_it_once_more_is_refused(tmp_path: Path) -> None:
    folder = written(awq(), tmp_path)
    with pytest.raises(
        OptionError, match=r"quantized already \(int4\) and keeps its own: .*'w8a8'"
    ):
        compile_model(folder, "eager", quantization="w8a8")
