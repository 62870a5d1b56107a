"""Checkpoints of every kind: causal LMs, encoders with and without a head, text with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
)

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.cli import main
from inlay.errors import UnsupportedModelError
from inlay.lowering.guards import run_alone
from inlay.lowering.loading import load_source
from inlay.lowering.random_weights import randomise
from inlay.lowering.support import auto_class
from inlay.passes.check import relative_rms
from tests.test_architectures import hidden_states
from tests.toys import ENCODERS, MULTIMODAL, build_toy, config_of

REQUESTS = [[7, 8, 9, 50, 60, 61, 7], [90, 5, 33], list(range(5, 40))]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def with_head(name: str) -> PreTrainedModel:
    return randomise(AutoModelForMaskedLM.from_config(config_of(name)).eval())


def check_hidden_states(engine: Engine, model: PreTrainedModel) -> None:
    assert engine.is_encoder
    for request, states in zip(REQUESTS, hidden_states(engine, REQUESTS), strict=True):
        with torch.no_grad():
            expected = run_alone(model, torch.tensor([request]))
        # Sums in another order.
        assert relative_rms(expected, states) <= 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    engine = compile_model(saved(model, tmp_path), "eager", dtype="float32")
    check_hidden_states(engine, model)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_saved_with_their_masked_lm_head(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_head(name)
    folder = saved(model, tmp_path)
    assert "MaskedLM" in json.loads((folder / "config.json").read_text())["architectures"][0]
    engine = compile_model(folder, "eager", dtype="float32")
    check_hidden_states(engine, model.base_model)
    assert "weights that its config has no use for" in caplog.text, "the head is not run: say so"


def test_an_encoder_in_bfloat16_without_its_pooler_in_memory() -> None:
    model = randomise(BertModel(config_of("bert"), add_pooling_layer=False).eval())
    check_hidden_states(compile_model(model, "eager", dtype="float32"), model)
    engine = compile_model(model, "eager", dtype="bfloat16")
    assert engine.manifest["errors"]["engine"] <= 2 * engine.manifest["errors"]["hugging_face"]


def test_an_encoder_does_not_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(with_head("bert"), tmp_path / "model")
    options = ["--backend", "eager", "--dtype", "float32"]
    target = tmp_path / "engine"
    assert main(["build", str(folder), "-o", str(target), *options]) == 0
    assert Engine.load(target).is_encoder
    with (
        LLM(str(target), in_process=True) as llm,
        pytest.raises(UnsupportedModelError, match="is an encoder: it does not generate"),
    ):
        llm.generate([5, 6])
    capsys.readouterr()
    assert main(["run", str(target), "-p", "hello"]) == 1
    assert "is an encoder: it does not generate" in capsys.readouterr().err


def test_another_head_is_left_away_and_a_decoder_kept(tmp_path: Path) -> None:
    classifier = randomise(BertForSequenceClassification(config_of("bert")).eval())
    loaded = load_source(saved(classifier, tmp_path / "classifier"), "auto").model
    assert type(loaded) is BertModel
    assert loaded.pooler is None
    decoder = randomise(BertLMHeadModel(config_of("bert", is_decoder=True)).eval())
    assert type(load_source(saved(decoder, tmp_path / "lm"), "auto").model) is BertLMHeadModel


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_tower_of_a_model_for_text_and_images(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = []
    for given in (model, saved(model, tmp_path)):
        engine = compile_model(given, "eager", dtype="float32", block_size=16)
        llm = LLM(engine, in_process=True, kv_cache_tokens=512)
        outputs = llm.generate(REQUESTS, params, use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert tokens[0] == tokens[1]
    for request, ours in zip(REQUESTS, tokens[1], strict=True):
        theirs = model.generate(
            input_ids=torch.tensor([request]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert theirs[0, len(request) :].tolist() == list(ours)


@pytest.mark.parametrize(
    ("model_type", "saved_from", "expected"),
    [
        ("llama", "LlamaForCausalLM", AutoModelForCausalLM),
        ("llama", None, AutoModelForCausalLM),
        ("bart", "BartForConditionalGeneration", AutoModelForCausalLM),
        ("llama4", "Llama4ForCausalLM", AutoModelForCausalLM),
    ],
)
def test_which_class_loads(model_type: str, saved_from: str | None, expected: Any) -> None:
    config = AutoConfig.for_model(model_type, architectures=saved_from and [saved_from])
    assert auto_class(config) is expected
    assert auto_class(BertConfig(architectures=["BertModel"])) is not expected
