from __future__ import annotations

import enum
from contextlib import suppress
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from inlay.aliases import CALL, CONSTRUCTOR, KV_CACHE_CONFIG, SCHEDULER_CONFIG, translate
from inlay.errors import InlayError, OptionError, RequestError
from inlay.lowering.options import CompileOptions
from inlay.runtime.config import ExecutorConfig
from tests.fake_llm import GREEDY, FakeLLM

OURS = {field.name for cls in (CompileOptions, ExecutorConfig) for field in fields(cls)}


class Policy(enum.Enum):
    MAX_UTILIZATION = "MAX_UTILIZATION"


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"max_model_len": 32}, {"max_seq_len": 32}),
        ({"max_model_len": None}, {}),
        ({"max_num_batched_tokens": 20}, {"max_num_tokens": 20}),
        ({"max_batch_size": 3}, {"max_num_seqs": 3}),
        ({"gpu_memory_utilization": 0.5}, {"kv_cache_free_fraction": 0.5}),
        ({"swap_space": 0.5}, {"host_cache_memory": 2**29}),
        ({"enforce_eager": True}, {"cuda_graphs": False}),
        ({"enforce_eager": False}, {}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"dtype": "auto", "device": "auto", "trust_remote_code": False}, {}),
        ({"device": "cuda"}, {"device": "cuda"}),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"enable_prefix_caching": False}, {"enable_prefix_caching": False}),
        (
            {"kv_cache_config": {"enable_block_reuse": False, "max_tokens": 64, "dtype": "fp8"}},
            {"enable_prefix_caching": False, "kv_cache_tokens": 64, "kv_cache_dtype": "fp8"},
        ),
        (
            {"kv_cache_config": SimpleNamespace(free_gpu_memory_fraction=0.3, host_cache_size=9)},
            {"kv_cache_free_fraction": 0.3, "host_cache_memory": 9},
        ),
        (
            {"scheduler_config": {"capacity_scheduler_policy": Policy.MAX_UTILIZATION}},
            {"scheduler_policy": "max_utilization"},
        ),
        ({"max_model_len": 32, "max_seq_len": 32}, {"max_seq_len": 32}),
        ({"kv_cache_tokens": 9, "nobody_knows": 1}, {"kv_cache_tokens": 9, "nobody_knows": 1}),
    ],
)  # fmt: skip
def test_other_names_for_our_options(given: dict[str, Any], ours: dict[str, Any]) -> None:
    assert translate(given) == ours
    assert set(ours) <= OURS | {"nobody_knows"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: .*not built yet; allowed: 1"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True"),
        ({"speculative_config": {"model": "x"}}, "speculative decoding is not built yet"),
        ({"enable_lora": True}, "enable_lora=True: LoRA is not built yet; allowed: False"),
        ({"quant_config": "awq"}, "quant_config='awq': give quantization, such as 'w8a8'"),
        ({"max_input_len": 5}, "max_input_len=5: .*give max_seq_len"),
        ({"kv_cache_config": {"tokens_per_block": 8}}, r"kv_cache_config\.tokens_per_block=8"),
        ({"kv_cache_config": {"tokens": 8}}, "kv_cache_config knows no 'tokens'; allowed: enab"),
        ({"kv_cache_config": 5}, "kv_cache_config must be a dict or a config object; given 5"),
        ({"enforce_eager": "yes"}, "enforce_eager must be True or False; given 'yes'"),
        ({"max_model_len": 3, "max_seq_len": 4}, "max_model_len and max_seq_len are one option"),
        (
            {"kv_cache_tokens": 3, "kv_cache_config": {"max_tokens": 4}},
            "kv_cache_tokens and kv_cache_config are one option, kv_cache_tokens; given 3 and 4",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_says_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        translate(given)


OFF = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "enable_lora": False,
    "speculative_config": None,
    "quant_config": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "load_format": "auto",
    "disable_log_stats": True,
    "device": None,
}


def test_defaults_of_other_engines_ask_for_nothing() -> None:
    assert translate(OFF) == {}
    assert translate(dict.fromkeys(CONSTRUCTOR)) == {}
    with FakeLLM(**OFF, max_model_len=32, max_batch_size=2, enforce_eager=True, seed=0) as llm:
        limits = llm._frontend.client.admission.limits
        assert (limits.max_seq_len, limits.max_num_seqs) == (32, 2)


@pytest.mark.parametrize("table", [CONSTRUCTOR, KV_CACHE_CONFIG, SCHEDULER_CONFIG, CALL])
def test_a_rule_gives_options_that_exist(table: dict[str, Any]) -> None:
    for name, rule in table.items():
        for value in (True, 1, 0.5, "other", {}):
            found = {}
            with suppress(InlayError):
                found = rule(name, value)
            assert set(found) <= OURS, name


def test_names_are_not_ours_too() -> None:
    """A name of ours in the table is there for its values only."""
    own = {"dtype", "device", "trust_remote_code", "enable_prefix_caching", "kv_cache_dtype"}
    assert set(CONSTRUCTOR) & OURS == own


def test_arguments_of_calls() -> None:
    with FakeLLM() as llm:
        off = {"lora_request": None, "guided_decoding": None, "prompt_adapter_request": None}
        assert llm.generate("x", GREEDY, use_tqdm=False, **off)[0].finished
        assert llm.generate_async("x", GREEDY, **off).result().finished
        for call in (llm.generate, llm.generate_async, llm.stream):
            with pytest.raises(RequestError, match="lora_request='a': LoRA is not built yet"):
                call("x", GREEDY, lora_request="a")  # type: ignore[operator]
            with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
                call("x", GREEDY, temprature=1)  # type: ignore[operator]
        with pytest.raises(RequestError, match=r"prompt_token_ids=.*give the token ids as the pro"):
            llm.generate(prompt_token_ids=[[1, 2]])
        with pytest.raises(RequestError, match="guided_decoding"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY, guided_decoding="json")


def test_a_seed_for_requests_without_one() -> None:
    def tokens(seed: int | None) -> list[list[int]]:
        from inlay import SamplingParams

        with FakeLLM(seed=seed) as llm:
            params = SamplingParams(max_tokens=8)
            outputs = llm.generate(["a fox", "a fox"], params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs]

    first, second = tokens(0)
    assert first != second, "each request has a seed of its own"
    assert tokens(0) == [first, second]
    assert tokens(1) != [first, second]
    assert tokens(None) != tokens(None)
