"""The build's own judgement of quantization: right engines pass, broken ones never come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.errors import OptionError, VerificationError
from inlay.lowering import quantization_check as judged
from inlay.lowering.guards import References
from inlay.passes import weights
from tests.quantizable import build_quantizable

OPTIONS: dict[str, Any] = {"block_size": 16, "max_num_tokens": 64, "max_num_seqs": 8}
PROMPTS = [[5, 6, 7, 8, 9], [100], list(range(40, 61))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
FORMATS = [
    "w8a8",
    "w8a8,activation_symmetric=false,embeddings=int8",
    "w8a16,group_size=32,symmetric=false",
    "w4a16",
    "w4a16,symmetric=false,lm_head=w4a16",
    "fp8",
    "fp8,weight_scales=tensor,lm_head=fp8",
]

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine, in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("text", FORMATS)
def test_an_engine_gives_what_the_quantized_graph_gives(text: str) -> None:
    engine = compile_model(build_quantizable("llama"), "eager", quantization=text, **OPTIONS)
    errors = engine.manifest["errors"]
    # The same ops on the same numbers, through pages: sums in another order at most.
    assert errors["engine"] < 1e-5
    assert errors["quantization"] > 1e-3
    assert engine.manifest["options"]["quantization"].startswith(text.partition(",")[0])
    assert all(len(output) == 12 for output in tokens(engine))


@pytest.mark.slow
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "gpt_oss"])
def test_compiled_engines_give_the_same_tokens(name: str, text: str) -> None:
    model = build_quantizable(name)
    compiled = compile_model(model, "inductor", quantization=text, **OPTIONS)
    # In float32 a number on the other side of a tie is rare, and none was seen.
    assert compiled.manifest["errors"]["engine"] < 1e-3
    assert tokens(compiled) == tokens(compile_model(model, "eager", quantization=text, **OPTIONS))


def test_one_compiled_engine_gives_the_same_tokens() -> None:
    test_compiled_engines_give_the_same_tokens("qwen2", "w8a8")


def swapped_nibbles(parts: Parts) -> Parts:
    values, scales, zeros = parts
    return (values >> 4) | ((values & 15) << 4), scales, zeros


def lost_zeros(parts: Parts) -> Parts:
    values, scales, zeros = parts
    return values, scales, None if zeros is None else torch.zeros_like(zeros)


def rolled_scales(parts: Parts) -> Parts:
    values, scales, zeros = parts
    return values, scales * torch.linspace(0.5, 2, scales.shape[-1]).to(scales.dtype), zeros


def rolled_rows(parts: Parts) -> Parts:
    values, scales, zeros = parts
    return values.roll(1, dims=-2), scales, zeros


def off_by_one(parts: Parts) -> Parts:
    values, scales, zeros = parts
    return values, scales, None if zeros is None else zeros + 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("w4a16", swapped_nibbles),
        ("w4a16,symmetric=false", lost_zeros),
        ("w4a16,symmetric=false", off_by_one),
        ("w8a16,symmetric=false", lost_zeros),
        ("w4a16", rolled_scales),
        ("w8a8", rolled_scales),
        ("fp8", rolled_rows),
        ("w8a8", rolled_rows),
    ],
)
def test_wrongly_rounded_weights_are_caught_at_their_layer(
    text: str, fault: Callable[[Parts], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights.quantize_weight
    monkeypatch.setattr(weights, "quantize_weight", lambda *args: fault(right(*args)))
    with pytest.raises(VerificationError, match=r"spoils layer model\.layers\.0\.self_attn"):
        compile_model(build_quantizable("llama"), "eager", quantization=text, **OPTIONS)


def test_an_engine_that_differs_from_the_quantized_graph_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What goes wrong behind the check of the layers: here the weights that are written."""
    right = judged.quantized_references

    def corrupting(before: Any, after: Any, *args: Any, **kwargs: Any) -> Any:
        references = right(before, after, *args, **kwargs)
        for recipe in after.meta["recipes"].values():
            if recipe["op"] == "quantize" and recipe["part"] == "scales":
                recipe["part"] = "scales"
                recipe["scheme"] = {**recipe["scheme"], "weight": "int4"}
        return references

    monkeypatch.setattr("inlay.lowering.pipeline.quantized_references", corrupting)
    with pytest.raises(VerificationError, match="does not compute what the quantized graph"):
        compile_model(build_quantizable("llama"), "eager", quantization="w8a8", **OPTIONS)


@pytest.mark.parametrize(
    ("noise", "error", "passes"),
    # 2 x noise + 1.25 x rounding are allowed in a narrow dtype, nothing of this in float32.
    [(0.03, 0.25, True), (0.03, 0.27, False), (0.0, 0.01, False)],
)
def test_a_quantized_engine_may_be_as_far_from_hugging_face_as_its_graph(
    noise: float, error: float, passes: bool
) -> None:
    references = References((), noise, rounding=0.16)
    exact = torch.randn(40, 64)
    off = torch.randn(40, 64)
    got = exact + off * (error * exact.norm() / off.norm())
    assert references.is_as_near(exact, got) is passes


def test_a_pattern_that_means_no_layer_is_refused() -> None:
    model = build_quantizable("llama")
    with pytest.raises(OptionError, match=r"'\*.o_prjo' means no layer of .*, whose layers are mo"):
        compile_model(model, "eager", quantization="w8a8,ignore=*.o_proj|*.o_prjo", **OPTIONS)


def test_where_all_is_left_out_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = build_quantizable("llama")
    compile_model(model, "eager", quantization="w8a16,ignore=*", verify="capture", **OPTIONS)
    assert any("no layer of" in record.message for record in caplog.records)


def test_what_cannot_be_asked_for_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(OptionError, match="format must be one of"):
        compile_model("no-such-model", "eager", quantization="w3a3")
