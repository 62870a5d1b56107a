"""Refit: other weights under compiled code are those of a fresh build, bit by bit; what is of
another model is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.backends.artifact import SELF, WeightReader
from inlay.backends.base import BuildSettings
from inlay.backends.eager.backend import EagerBackend
from inlay.errors import BuildError, InlayError, ModelLoadError, VerificationError
from inlay.lowering import pipeline
from inlay.lowering import refit as module
from inlay.lowering.partition import partition
from inlay.lowering.random_weights import randomise
from inlay.lowering.refit import check_program
from inlay.lowering.stored_graph import own_tensors, read_graph
from inlay.passes.pass_manager import AFTER_QUANTIZATION, run_passes
from inlay.passes.quantize.config import QuantizationConfig
from tests.quantizable import build_quantizable
from tests.quantized_checkpoints import Format, gptq, packed, w8a8, write
from tests.runtime.toy_tokenizers import byte_level
from tests.toys import build_toy

OPTIONS: dict[str, Any] = {"block_size": 16, "max_num_tokens": 64, "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
TEXTS = [{"token_ids": [(7 * i + 11 * j) % 128 for j in range(48)]} for i in range(4)]


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine, in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate([[5, 6, 7, 8], [100]], GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def weight_files(engine: Engine) -> dict[str, str]:
    files = engine.manifest["files"].items()
    return {name: facts["sha256"] for name, facts in files if name.startswith("weights/")}


def calibrated(format_: str, **settings: Any) -> QuantizationConfig:
    return QuantizationConfig(format=format_, calibration=TEXTS, **settings)


# --- bitwise ---------------------------------------------------------------------------------

CASES: dict[str, tuple[str, torch.dtype, Any]] = {
    "float32": ("llama", torch.float32, "none"),
    "tied, bfloat16": ("qwen2", torch.bfloat16, "none"),
    "experts": ("qwen3_moe", torch.float32, "none"),
    "w8a8": ("qwen2", torch.float32, "w8a8,embeddings=int8"),
    "w4a16": ("llama", torch.bfloat16, "w4a16"),
    "w4a16 experts": ("qwen3_moe", torch.float32, "w4a16"),
    "gptq": ("llama", torch.float32, calibrated("w4a16", method="gptq")),
    "awq": ("llama", torch.float32, calibrated("w4a16", method="awq")),
    "smoothquant, static": (
        "llama",
        torch.float32,
        calibrated("w8a8", method="smoothquant", activation_scales="static"),
    ),
}


SLOW = ("tied, bfloat16", "experts", "w4a16", "awq")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES]
)
def test_weights_are_those_of_a_fresh_build(case: str, tmp_path: Path) -> None:
    name, dtype, quantization = CASES[case]
    options = {**OPTIONS, "quantization": quantization}
    # Through directories: experts are put together by from_pretrained.
    first, second = tmp_path / "first", tmp_path / "second"
    build_quantizable(name, dtype).save_pretrained(first)
    randomise(build_quantizable(name, dtype), seed=5).save_pretrained(second)
    engine = compile_model(str(first), "eager", **options)
    fresh = compile_model(str(second), "eager", **options)
    refitted = engine.refit(str(second), tmp_path / "refitted")
    assert weight_files(refitted) == weight_files(fresh) != weight_files(engine)
    assert refitted.artifact.recipes == fresh.artifact.recipes
    assert refitted.manifest["errors"].keys() == fresh.manifest["errors"].keys()
    assert tokens(refitted) == tokens(fresh)
    pruned = engine.prune(tmp_path / "pruned")
    again = pruned.refit(str(first), tmp_path / "again")
    assert weight_files(again) == weight_files(engine)
    count = len(pruned.manifest["pruned"]["weights"])
    assert again.manifest["provenance"][-1]["same_as_pruned"] == count
    assert tokens(again) == tokens(engine)


def test_what_was_not_run_again_is_not_said_to_be(tmp_path: Path) -> None:
    model = build_toy("llama")
    engine = compile_model(model, "eager", **OPTIONS)
    assert engine.manifest["checked"] == "the eager engine"
    refitted = engine.refit(model, tmp_path / "refitted", verify="capture")
    assert "checked" not in refitted.manifest
    assert "engine" not in refitted.manifest["errors"]
    again = refitted.refit(model, tmp_path / "again", verify="engine")
    assert again.manifest["checked"] == "the eager engine"


def test_what_code_says_of_itself_is_told_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_toy("llama")
    engine = compile_model(model, "eager", **OPTIONS)
    monkeypatch.setattr(EagerBackend, "refit", lambda *_: {"version": "9.9"})
    refitted = engine.refit(model, tmp_path / "refitted")
    assert refitted.manifest["target"] == {**engine.manifest["target"], "version": "9.9"}


@pytest.mark.parametrize(
    "form",
    [gptq(), gptq(4, 32, False, desc_act=True), w8a8({})],
    ids=["gptq", "gptq act order", "w8a8"],
)
def test_a_quantized_checkpoint(form: Format, tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        model = randomise(build_toy("llama", layers=1, intermediate_size=96), seed)
        folders.append(str(write(model, tmp_path / str(seed), *form).folder))
    engine = compile_model(folders[0], "eager", dtype="float32", **OPTIONS)
    fresh = compile_model(folders[1], "eager", dtype="float32", **OPTIONS)
    refitted = engine.prune(tmp_path / "pruned").refit(folders[1], tmp_path / "refitted")
    assert weight_files(refitted) == weight_files(fresh) != weight_files(engine)
    weights = fresh.artifact.program.weight_names
    assert 0 < refitted.manifest["provenance"][-1]["same_as_pruned"] < len(weights)  # RoPE's is
    assert tokens(refitted) == tokens(fresh)


STORED = ("gemma2", "gemma3n_text", "gpt2", "deepseek_v3", "bert", "gpt_oss", "bloom")


@pytest.mark.parametrize("name", STORED)
def test_the_stored_graph_gives_the_program_again(name: str) -> None:
    model = build_toy(name)
    engine = compile_model(model, "eager", verify="capture")
    captured = read_graph(engine.artifact, own_tensors(model))
    assert captured.max_num_tokens >= 2048
    run_passes(captured.graph, AFTER_QUANTIZATION)
    program, segments = partition(captured.graph, torch.float32)
    assert list(segments) == list(engine.artifact.program.segment_keys)
    check_program(name, engine.artifact, program)


# --- how ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile_model(build_toy("llama", layers=1), "eager", **OPTIONS)


def other(layers: int = 1, **overrides: Any) -> PreTrainedModel:
    return randomise(build_toy("llama", layers=layers, **overrides), seed=3)


def test_nothing_is_traced_or_compiled(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not in a refit")

    monkeypatch.setattr(torch.export, "export", forbidden)
    monkeypatch.setattr(EagerBackend, "build", forbidden)
    monkeypatch.setattr(pipeline, "capture", forbidden)
    said: list[str] = []
    made = engine.refit(other(), tmp_path / "engine", progress=said.append)
    assert [line.partition(":")[0] for line in said] == [
        "load",
        "graph",
        "weights",
        "code",
        "verify",
    ]
    before, after = engine.manifest, made.manifest
    assert after["provenance"][0] == before["provenance"][0]
    event = after["provenance"][1]
    assert (event["made_by"], event["origin"], event["of"]) == ("refit", "MODEL", before[SELF])
    assert event["weights_sha256"] != before["provenance"][0]["weights_sha256"]
    kept = [name for name in before["files"] if not name.startswith(("weights/", "model/"))]
    assert kept
    assert all(after["files"][name] == before["files"][name] for name in kept)


def test_the_code_may_hold_weights(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TensorRT's plans do: prune leaves them out, refit has them made of the new weights."""

    def plan(directory: Path) -> Path:
        return directory / "segments" / "plan"

    def refit(self: Any, directory: Path, program: Any, settings: Any) -> dict[str, Any]:
        reader = WeightReader(directory)
        plan(directory).write_text(str(float(reader.get("lm_head.weight").sum())))
        assert settings.limits.block_size == 16
        assert program == engine.artifact.program
        return {}

    monkeypatch.setattr(EagerBackend, "weight_files", lambda self, directory: [plan(directory)])
    monkeypatch.setattr(EagerBackend, "refit", refit)
    first, second = other(), randomise(build_toy("llama", layers=1), seed=4)
    made = engine.refit(first, tmp_path / "made")
    assert plan(made.path).read_text() == str(total(first))
    pruned = made.prune(tmp_path / "pruned")
    assert not plan(pruned.path).exists()
    again = pruned.refit(second, tmp_path / "again")
    assert plan(again.path).read_text() == str(total(second))


def total(model: Any) -> float:
    return float(model.lm_head.weight.detach().sum())


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = module.weights_of
    monkeypatch.setattr(
        module,
        "weights_of",
        lambda *args: ((n, -t if n == "lm_head.weight" else t) for n, t in real(*args)),
    )


def test_a_wrong_engine_is_not_handed_out(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(VerificationError, match="the eager engine does not compute what Hugging"):
        engine.refit(other(), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
    made = engine.refit(other(), tmp_path / "engine", verify="capture")
    assert "engine" not in made.manifest["errors"]
    assert made.manifest["options"]["verify"] == "capture"


def test_the_tokenizer_stays_where_there_is_no_other(tmp_path: Path) -> None:
    model = build_toy("llama", layers=1)
    engine = compile_model(model, "eager", tokenizer=byte_level(), verify="capture")
    made = engine.prune(tmp_path / "p").refit(other(), tmp_path / "r")
    assert made.tokenizer().encode("a fox") == byte_level().encode("a fox")


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta is 500000"),
        ({"rms_norm_eps": 1e-3}, "its rms_norm_eps is 0.001 instead of 1e-06"),
        ({"hidden_act": "gelu"}, "its hidden_act is 'gelu' instead of 'silu'"),
        ({"tie_word_embeddings": True}, "its tie_word_embeddings is True"),
        ({"layers": 2}, r"num_hidden_layers is 2 .*layers\.1\.\S+ is left over"),
        ({"attention_bias": True}, r"attention_bias is True.*q_proj.bias is left over"),
        (
            {"intermediate_size": 80},
            r"intermediate_size is 80 instead of 112.*gate_proj.weight is float32 \[80, 64\] "
            r"instead of float32 \[112, 64\]",
        ),
    ],
)
def test_another_model_is_refused_by_name(
    change: dict[str, Any], message: str, engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        engine.refit(other(**change), tmp_path / "engine")
    assert "`inlay build`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_window_is_of_the_model(tmp_path: Path) -> None:
    engine = compile_model(build_toy("mistral", layers=1), "eager", verify="capture")
    with pytest.raises(ModelLoadError, match="its sliding_window is 16 instead of 8"):
        engine.refit(build_toy("mistral", layers=1, sliding_window=16), tmp_path / "engine")
    with pytest.raises(ModelLoadError, match="its model_type is llama instead of mistral"):
        engine.refit(other(), tmp_path / "engine")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with_bias = build_toy("llama", layers=1, attention_bias=True)
    engine = compile_model(with_bias, "eager", verify="capture")
    with pytest.raises(ModelLoadError, match=r"self_attn\.q_proj\.bias is missing"):
        engine.refit(other(), tmp_path / "engine")


def test_what_computes_nothing_may_differ(engine: Engine, tmp_path: Path) -> None:
    model = other(eos_token_id=9, attention_dropout=0.5, initializer_range=1.0)
    made = engine.refit(model, tmp_path / "engine", verify="capture")
    assert made.model_config["eos_token_id"] == 9


def test_checkpoints_that_are_quantized_otherwise(engine: Engine, tmp_path: Path) -> None:
    def checkpoint(name: str, form: Format) -> str:
        model = build_toy("llama", layers=1, hidden_size=128, intermediate_size=128)
        return str(write(model, tmp_path / name, *form).folder)

    folder = checkpoint("a", packed(4, 32))
    quantized = compile_model(folder, "eager", dtype="float32", verify="capture")
    plain = str(tmp_path / "a" / "meant")
    with pytest.raises(ModelLoadError, match=r"is not quantized, and .* was made of one that is"):
        quantized.refit(plain, tmp_path / "engine")
    with pytest.raises(ModelLoadError, match=r"does not give the program that .* step 0 differs"):
        quantized.refit(checkpoint("b", packed(4, 64)), tmp_path / "engine")
    whole = compile_model(plain, "eager", verify="capture")
    with pytest.raises(ModelLoadError, match=r"is quantized already, and .* was built of unquant"):
        whole.refit(folder, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_what_the_backend_lacks_is_said_before_weights_are_read(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(self: EagerBackend, settings: BuildSettings) -> None:
        raise BuildError(f"no library for {settings.target}")

    monkeypatch.setattr(EagerBackend, "check_refit", lacking)
    with pytest.raises(BuildError, match="no library for auto"):
        engine.refit("no/such/place/here", tmp_path / "engine")


@pytest.mark.parametrize("weights", ["no/such/place/here", 5])
def test_what_is_no_checkpoint(weights: Any, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InlayError, match=r"no/such/place/here|int"):
        engine.refit(weights, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []
