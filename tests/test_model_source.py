from __future__ import annotations

from typing import Any

import pytest

import inlay.engine
from inlay.errors import OptionError
from inlay.model_source import EngineLike, default_sampling, open_engine
from inlay.runtime.config import ExecutorConfig
from tests.fake_llm import FakeEngine
from tests.runtime.toy_tokenizers import byte_level


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, dict[str, Any]]]:
    """What was asked of inlay.engine, in place of doing it."""
    seen: list[tuple[str, Any, dict[str, Any]]] = []

    def compile_model(model: Any, **options: Any) -> EngineLike:
        seen.append(("compile", model, options))
        return FakeEngine()

    def load(path: Any, **options: Any) -> EngineLike:
        seen.append(("load", path, options))
        return FakeEngine()

    monkeypatch.setattr(inlay.engine, "compile_model", compile_model)
    monkeypatch.setattr(inlay.engine.Engine, "load", load)
    monkeypatch.setattr(inlay.engine, "is_artifact", lambda model: model == "artifact")
    return seen


def test_an_engine_is_taken_as_it_is(calls: list[Any]) -> None:
    engine = FakeEngine()
    opened, tokenizer, config = open_engine(engine, None, {"max_num_seqs": 2})
    assert opened is engine
    assert tokenizer is byte_level()
    assert config == ExecutorConfig(max_num_seqs=2)
    assert calls == []
    with pytest.raises(OptionError, match=r"LLM\(an engine, ...\) knows no option 'backend'"):
        open_engine(engine, None, {"backend": "eager"})


def test_an_artifact_is_loaded(calls: list[Any]) -> None:
    options = {"backend": "eager", "max_seq_len": 32}
    _, _, config = open_engine("artifact", None, options)
    assert calls == [("load", "artifact", {"backend": "eager"})]
    assert config.max_seq_len == 32
    with pytest.raises(OptionError, match="knows no option 'dtype'"):
        open_engine("artifact", None, {"dtype": "float32"})


def test_a_model_is_compiled_for_the_sizes_given(calls: list[Any]) -> None:
    tokenizer = byte_level()
    options = {"dtype": "float32", "max_seq_len": 32, "kv_cache_tokens": 99, "debug": True}
    _, used, config = open_engine("org/model", tokenizer, options)
    built = {"dtype": "float32", "max_seq_len": 32, "tokenizer": tokenizer}
    assert calls == [("compile", "org/model", built)]
    assert used is tokenizer
    assert config == ExecutorConfig(kv_cache_tokens=99, debug=True)


def test_bad_values_are_found_before_a_long_build(calls: list[Any]) -> None:
    with pytest.raises(OptionError, match="kv_cache_tokens must be an integer"):
        open_engine("org/model", None, {"kv_cache_tokens": "many"})
    assert calls == []


def test_the_end_of_sequence_may_be_given(calls: list[Any]) -> None:
    engine = FakeEngine(generation_config={"eos_token_id": 5})
    assert open_engine(engine, None, {})[2].eos_token_ids == (5,)
    assert open_engine(engine, None, {"eos_token_ids": (7, 8)})[2].eos_token_ids == (7, 8)


def test_what_a_generation_config_asks_for_in_vain(caplog: pytest.LogCaptureFixture) -> None:
    given = {"repetition_penalty": 1.3, "sequence_bias": 4, "min_length": 0, "penalty_alpha": None}
    params = default_sampling(FakeEngine(generation_config=given))
    assert params.repetition_penalty == 1.3
    assert "not applied: {'sequence_bias': 4}" in caplog.text
    params = default_sampling(FakeEngine(generation_config={"min_new_tokens": 40}))
    assert (params.min_tokens, params.max_tokens) == (40, 40)
    with pytest.raises(OptionError, match=r"generation_config\.json is wrong: .*temperature"):
        default_sampling(FakeEngine(generation_config={"temperature": -3}))


def test_beams_of_the_models_own(caplog: pytest.LogCaptureFixture) -> None:
    config = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "top_p": 0.9}
    params = default_sampling(FakeEngine(generation_config=config))
    assert (params.use_beam_search, params.best_of, params.n) == (True, 4, 2)
    assert (params.length_penalty, params.top_p) == (0.5, 1.0)
    params = default_sampling(FakeEngine(generation_config={**config, "do_sample": True}))
    assert not params.use_beam_search
    assert params.top_p == 0.9
    assert "num_beams=4 with do_sample is not applied" in caplog.text
