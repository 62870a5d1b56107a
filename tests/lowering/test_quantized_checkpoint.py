"""Quantized checkpoints: what is read is what the format means, and what is run is what is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from inlay import compile_model
from inlay.errors import VerificationError
from inlay.lowering.capture import capture
from inlay.lowering.guards import References, packed_check, reference_logits
from inlay.lowering.loading import Source, load_source
from inlay.lowering.quantization_check import quantized_references
from inlay.passes.check import relative_rms
from inlay.passes.graph import copy_graph
from inlay.passes.pass_manager import BEFORE_QUANTIZATION, PassReport, quantization, run_passes
from inlay.passes.quantize.config import Scheme
from tests.quantized_checkpoints import (
    Format,
    Written,
    awq,
    blocks,
    fp8,
    gptq,
    modelopt,
    packed,
    w8a8,
    write,
)
from tests.toys import build_toy

SAME = 1e-5
"""Relative RMS of float32 logits: sums in another order cost 2e-6 and less."""
WRONG = 1e-2
"""What every mistake in reading costs at least."""

TOKEN = {"strategy": "token"}
STATIC = {"strategy": "tensor", "dynamic": False}
SIZES = {"layers": 1, "intermediate_size": 128}
WIDE = {**SIZES, "hidden_size": 128}
BLOCKS = {"layers": 1, "hidden_size": 256, "intermediate_size": 200}

CASES: dict[str, tuple[str, dict[str, Any], Format, Scheme]] = {
    "gptq": ("llama", SIZES, gptq(), Scheme("int4", group_size=32)),
    "gptq zeros": ("qwen2", SIZES, gptq(4, 32, False), Scheme("int4", "none", 32, False)),
    "gptq_v2": ("llama", WIDE, gptq(4, 64, False, v2=True), Scheme("int4", "none", 64, False)),
    "gptq act order": (
        "qwen2",
        SIZES,
        gptq(4, 32, False, desc_act=True),
        Scheme("int4", "none", 32, False),
    ),
    "gptq 8 bits": ("llama", SIZES, gptq(8, -1), Scheme("int8")),
    "gptq 8 bits zeros": ("llama", SIZES, gptq(8, 32, False), Scheme("int8", "none", 32, False)),
    "awq": ("qwen2", SIZES, awq(), Scheme("int4", "none", 32, False)),
    "awq rows": ("llama", SIZES, awq(-1), Scheme("int4", symmetric=False)),
    "w4a16": ("llama", SIZES, packed(), Scheme("int4", group_size=32)),
    "w4a16 zeros": ("qwen2", SIZES, packed(symmetric=False), Scheme("int4", "none", 32, False)),
    "w8a16": ("llama", SIZES, packed(8, -1), Scheme("int8")),
    "fp8 weights": ("llama", SIZES, fp8("channel", None), Scheme("fp8")),
    "w8a8": ("llama", SIZES, w8a8(TOKEN), Scheme("int8", "int8")),
    "w8a8 static": ("qwen2", SIZES, w8a8(STATIC, 0.02), Scheme("int8", "int8", static=True)),
    "w8a8 static zero": (
        "llama",
        SIZES,
        w8a8({**STATIC, "symmetric": False}, 0.1, 40),
        Scheme("int8", "int8", static=True, activation_symmetric=False),
    ),
    "fp8": ("llama", SIZES, fp8("channel", TOKEN), Scheme("fp8", "fp8")),
    "fp8 static": (
        "llama",
        SIZES,
        fp8("tensor", STATIC, 0.01),
        Scheme("fp8", "fp8", per_tensor=True, static=True),
    ),
    "fp8 blocks": ("llama", BLOCKS, blocks(), Scheme("fp8", "fp8", 128)),
    "fp8 blocks, powers of two": (
        "llama",
        BLOCKS,
        blocks(torch.float8_e8m0fnu),
        Scheme("fp8", "fp8", 128),
    ),
    "modelopt": (
        "llama",
        SIZES,
        modelopt(),
        Scheme("fp8", "fp8", per_tensor=True, static=True),
    ),
    "modelopt rows": (
        "llama",
        SIZES,
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        Scheme("fp8", "fp8"),
    ),
}
"""Model, its sizes, what its linear layers are stored as, and the scheme that this is."""


def written(case: str, folder: Path) -> Written:
    kind, sizes, made, _ = CASES[case]
    return write(build_toy(kind, **sizes), folder, *made)


def differences(source: Source, expected: PreTrainedModel) -> dict[str, float]:
    """By parameter, the relative RMS error of what was read."""
    return {
        name: relative_rms(parameter.detach(), source.model.get_parameter(name).detach(), 1.0)
        for name, parameter in expected.named_parameters()
        if not torch.equal(parameter, source.model.get_parameter(name))
    }


def quantized_graph(source: Source) -> tuple[References, PassReport]:
    """The requests with the quantized graph's logits, and what the pass did."""
    assert source.stored is not None
    captured = capture(source.model, 64, 64)
    references = reference_logits(source.model, captured, 64)
    check = packed_check(captured, references, 32)
    run_passes(captured.graph, BEFORE_QUANTIZATION)
    captured.sources = {**captured.sources, **source.stored.given}
    before = copy_graph(captured.graph)
    (report,) = run_passes(captured.graph, [quantization(source.stored)])
    return quantized_references(before, captured.graph, references, check, True), report


@torch.no_grad()
def error(references: References, model: PreTrainedModel) -> float:
    """Relative RMS of the graph's logits against a model's, each request alone."""
    ours = torch.cat([request.logits for request in references.requests])
    theirs = [model(request.token_ids[None]).logits[0] for request in references.requests]
    return relative_rms(torch.cat(theirs), ours, 1.0)


@pytest.mark.parametrize("case", CASES)
def test_each_format_means_what_it_says(case: str, tmp_path: Path) -> None:
    checkpoint = written(case, tmp_path)
    source = load_source(checkpoint.folder, "float32")
    assert differences(source, checkpoint.model) == {}
    assert source.stored is not None
    assert source.stored.config is None
    scheme = CASES[case][3]
    schemes = source.stored.schemes
    assert schemes["model.layers.0.self_attn.q_proj.weight"] == scheme
    # Of blocks, 200 inputs are one and a piece: down_proj is read, and runs dequantized.
    assert len(schemes) == (6 if "blocks" in case else 7)
    assert set(schemes.values()) == {scheme}
    assert not hasattr(source.model.config, "quantization_config")


def test_numbers_and_scales_are_those_stored(tmp_path: Path) -> None:
    checkpoint = written("w4a16", tmp_path)
    given = load_source(checkpoint.folder, "bfloat16").stored.given  # type: ignore[union-attr]
    name = "model.layers.0.mlp.down_proj.weight"
    assert given[f"{name}.values"].shape == (64, 64)
    assert given[f"{name}.values"].dtype == torch.uint8
    assert given[f"{name}.scales"].shape == (4, 64)
    assert given[f"{name}.scales"].dtype == torch.float16
    assert f"{name}.zeros" not in given


def transformers_runs(folder: Path, **options: Any) -> PreTrainedModel:
    pytest.importorskip("compressed_tensors")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize("case", ["gptq act order", "w4a16"])
def test_weights_alone_run_as_stored(case: str, tmp_path: Path) -> None:
    checkpoint = written(case, tmp_path)
    references, report = quantized_graph(load_source(checkpoint.folder, "float32"))
    assert (report.matches, report.expected, report.misses) == (4, 4, ())
    assert error(references, checkpoint.model) < SAME
    if case == "w4a16":
        assert error(references, transformers_runs(checkpoint.folder)) < SAME


def int8_by_token(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def int8_static(x: Tensor) -> Tensor:
    return ((x / 0.1).round() + 40).clamp(-128, 127).sub(40) * 0.1


def fp8_of_groups(x: Tensor) -> Tensor:
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def fp8_static(x: Tensor) -> Tensor:
    return (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "w8a8": int8_by_token,
    "w8a8 static zero": int8_static,
    "fp8 blocks": fp8_of_groups,
    "fp8 static": fp8_static,
}
GRID = {"w8a8": 0.1}
"""Where transformers differs: compressed-tensors' dynamic int8 scale is amax / 127.5, here (and in
vLLM) it is amax / 127. Two unrelated roundings of the same numbers, each 0.04 off the exact."""


@pytest.mark.parametrize("case", ROUNDED)
def test_activations_are_rounded_as_the_format_says(case: str, tmp_path: Path) -> None:
    """Against the reference model with rounded inputs. A number that falls on the other side of a
    tie would cost 1e-3 (1 in 1e5 may); with these seeds none does. And against transformers, where
    it can run the format on a CPU."""
    checkpoint = written(case, tmp_path)
    references, _ = quantized_graph(load_source(checkpoint.folder, "float32"))
    for name, module in checkpoint.model.named_modules():
        whole = case == "fp8 blocks" and "down_proj" in name
        if isinstance(module, nn.Linear) and name != "lm_head" and not whole:
            module.register_forward_pre_hook(lambda _, args: (ROUNDED[case](args[0]),))
    assert error(references, checkpoint.model) < SAME
    assert references.rounding > WRONG, "rounding activations does something"
    if case != "fp8 blocks":
        theirs = error(references, transformers_runs(checkpoint.folder))
        assert theirs < GRID.get(case, SAME)


MIXTURES = {
    "int4": (gptq(), "mixtral", {"int4"}, {"none"}),
    "int8": (w8a8(TOKEN), "qwen3_moe", {"int8"}, {"int8"}),
    "act order": (gptq(desc_act=True), "mixtral", {"int4"}, {"none"}),
    "blocks": (blocks(), "qwen3_moe", {"fp8"}, {"fp8", "none"}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_experts(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, kind, weights, activations = MIXTURES[case]
    sizes = {"layers": 1, "intermediate_size": 128}
    if kind == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 64, "hidden_size": 256 if case == "blocks" else 64}
    checkpoint = write(build_toy(kind, **sizes), tmp_path, *made, files=2)
    source = load_source(checkpoint.folder, "float32")
    assert differences(source, checkpoint.model) == {}
    assert source.stored is not None
    schemes = source.stored.schemes
    experts = [name for name in schemes if ".experts." in name]
    assert {scheme.weight for scheme in schemes.values()} == weights
    assert {scheme.activation for scheme in schemes.values()} == activations
    if case == "act order":
        assert experts == []
        assert "24 weights run dequantized" not in caplog.text
        assert "12 weights run dequantized" in caplog.text
        assert "act order" in caplog.text
        return
    assert len(experts) == 2, "both projections of the layer's experts"
    assert ("experts with group scales are not rounded" in caplog.text) == (case == "blocks")
    if case == "int4":
        references, report = quantized_graph(source)
        assert report.misses == ()
        assert report.matches == 3
        assert error(references, checkpoint.model) < SAME


def test_an_lm_head_and_tied_embeddings(tmp_path: Path) -> None:
    """The head is quantized, the embedding that it is tied to is not, and both are there."""
    pack, config = packed()
    model = build_toy("llama", **SIZES, tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.detach().clone()
    parts, meant = pack("lm_head", embedding)
    extra = {f"lm_head.{part}": tensor for part, tensor in parts.items()}
    checkpoint = write(model, tmp_path, pack, {**config, "ignore": []}, extra=extra, files=3)
    source = load_source(checkpoint.folder, "float32")
    assert source.stored is not None
    assert source.stored.schemes["lm_head.weight"].weight == "int4"
    assert torch.equal(source.model.lm_head.weight, meant)
    assert torch.equal(source.model.get_input_embeddings().weight, embedding)
    references, report = quantized_graph(source)
    assert report.matches == 5
    assert references.rounding < SAME


def test_a_quantized_embedding_that_is_the_head_too(tmp_path: Path) -> None:
    pack, config = packed()
    rows, eight = w8a8({})
    group = {"targets": ["Embedding"], "weights": eight["config_groups"]["group_0"]["weights"]}
    config["config_groups"]["group_1"] = {**group, "format": "int-quantized"}

    def both(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return (rows if "embed" in name else pack)(name, weight)

    model = build_toy("llama", **SIZES, tie_word_embeddings=True)
    checkpoint = write(model, tmp_path, both, config, skip="lm_head")
    references, report = quantized_graph(load_source(checkpoint.folder, "float32"))
    assert (report.matches, report.expected) == (6, 6)
    assert error(references, checkpoint.model) < SAME


@pytest.mark.parametrize("v2", [False, True])
def test_a_zero_point_of_zero(v2: bool, tmp_path: Path) -> None:
    """Which gptq_v2 stores as 0 and gptq as 15."""
    pack, config = gptq(4, 32, False, v2=v2)

    def positive(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = pack(name, weight.abs())
        assert set(tensors["qzeros"].flatten().tolist()) == {0 if v2 else -1}
        return tensors, meant

    checkpoint = write(build_toy("llama", **SIZES), tmp_path, positive, config)
    assert differences(load_source(checkpoint.folder, "float32"), checkpoint.model) == {}


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
def test_transformers_reads_the_same_zero_points(tmp_path: Path) -> None:
    made = packed(symmetric=False, scales_in=torch.float32)  # it dequantizes in the scales' dtype
    checkpoint = write(build_toy("llama", **SIZES), tmp_path, *made)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = transformers_runs(checkpoint.folder, **options)
    assert differences(load_source(checkpoint.folder, "float32"), model) == {}


def test_transformers_dequantizes_blocks_alike(tmp_path: Path) -> None:
    weight = torch.randn(256, 384)
    tensors, meant = blocks()[0]("", weight)
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"])
    assert torch.equal(theirs, meant), "the reference that the loader is compared with"


def spoil(change: Callable[[dict[str, Any]], None]) -> Callable[[Format], Format]:
    """A format whose checkpoints say something wrong of themselves, or lay it down wrong."""

    def changed(made: Format) -> Format:
        pack, config = made

        def wrong(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            tensors, meant = pack(name, weight)
            change(tensors)
            return tensors, meant

        return wrong, config

    return changed


def scrambled(tensors: dict[str, Any]) -> None:
    scales = tensors["scales"]
    tensors["scales"] = scales.t().reshape(scales.shape).contiguous()


TWINS: dict[str, Format] = {
    "zero points without + 1": (gptq(4, 32, False)[0], gptq(4, 32, False, v2=True)[1]),
    "and with one too many": (gptq(4, 32, False, v2=True)[0], gptq(4, 32, False)[1]),
    "nibbles as they come": awq(order=(0, 1, 2, 3, 4, 5, 6, 7)),
    "nibbles swapped": packed(order=(1, 0, 3, 2, 5, 4, 7, 6)),
    "scales transposed": spoil(scrambled)(gptq()),
    "order lost": spoil(lambda tensors: tensors.pop("g_idx"))((gptq(desc_act=True)[0], gptq()[1])),
}


@pytest.mark.parametrize("twin", TWINS)
def test_mistakes_in_the_layout_show(twin: str, tmp_path: Path) -> None:
    checkpoint = write(build_toy("llama", **SIZES), tmp_path, *TWINS[twin])
    found = differences(load_source(checkpoint.folder, "float32"), checkpoint.model)
    assert len(found) == 7
    assert min(found.values()) > WRONG


def test_an_order_that_the_graph_ignores_shows(tmp_path: Path) -> None:
    source = load_source(written("gptq act order", tmp_path).folder, "float32")
    assert source.stored is not None
    given = {key: part for key, part in source.stored.given.items() if not key.endswith(".order")}
    source.stored = type(source.stored)(None, source.stored.schemes, given)
    with pytest.raises(VerificationError, match=r"spoils layer .*fault of the checkpoint's reader"):
        quantized_graph(source)


def test_fused_parts_that_want_unlike_orders_are_left(tmp_path: Path) -> None:
    pack, config = gptq(desc_act=True)

    def own_order(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        tensors, meant = pack(name, weight)
        if name.endswith("k_proj"):
            tensors["g_idx"] = tensors["g_idx"].flip(0)
            meant = meant.flip(1)
            words = tensors["qweight"]
            nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], 1).flatten(0, 1)
            back = nibbles.flip(0).unflatten(0, (-1, 8)).long()
            total = sum(back[:, i] << (4 * i) for i in range(8))
            tensors["qweight"] = torch.as_tensor(total).to(torch.int32)
        return tensors, meant

    checkpoint = write(build_toy("llama", **SIZES), tmp_path, own_order, config)
    source = load_source(checkpoint.folder, "float32")
    assert differences(source, checkpoint.model) == {}
    references, report = quantized_graph(source)
    assert report.matches == 3
    assert report.expected == 4
    assert "want inputs of unlike order" in report.misses[0]
    assert error(references, checkpoint.model) < SAME


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def engine_gives_the_reference(backend: str, folder: Path) -> None:
    checkpoint = written("awq", folder)
    prompt = [3, 77, 12, 9, 101]
    engine = compile_model(checkpoint.folder, backend, dtype="float32", max_seq_len=64)
    from inlay import LLM, SamplingParams

    errors = engine.manifest["errors"]
    assert errors["quantization"] < SAME
    assert errors["engine"] < 5e-5
    out = LLM(engine).generate([prompt], SamplingParams(max_tokens=12, temperature=0))
    assert out[0].outputs[0].token_ids == greedy(checkpoint.model, prompt, 12)


def test_an_engine_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    engine_gives_the_reference("eager", tmp_path)


@pytest.mark.slow
def test_a_compiled_engine_of_a_quantized_checkpoint(tmp_path: Path) -> None:
    engine_gives_the_reference("inductor", tmp_path)
