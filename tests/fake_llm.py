"""An LLM over a FakeModel in this process: quick, and its tokens tell what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from inlay.backends.base import LoadedModel
from inlay.llm import LLM
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import LIMITS, FakeModel, generate_alone
from tests.runtime.toy_tokenizers import byte_level

TOKENIZER = byte_level()
VOCAB_SIZE = len(TOKENIZER)
GREEDY = SamplingParams(temperature=0, max_tokens=10)
PROMPTS = ["a fox", "The quick brown dog jumps over", "x"]


class FakeEngine:
    """An engine around a FakeModel; the tokenizer is the toy one unless told otherwise."""

    def __init__(
        self,
        tokenizer: Any = TOKENIZER,
        generation_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = FakeModel(replace(LIMITS, vocab_size=VOCAB_SIZE))
        self.generation_config = generation_config or {}
        self.model_config = model_config or {"eos_token_id": []}
        self._tokenizer = tokenizer

    def load_model(self) -> LoadedModel:
        return self.model

    def tokenizer(self) -> Any:
        return self._tokenizer


class FakeLLM(LLM):
    """An LLM over a FakeModel, which the test may look at."""

    def __init__(
        self,
        tokenizer: Any = TOKENIZER,
        generation_config: Mapping[str, Any] | None = None,
        model_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        engine = FakeEngine(tokenizer, generation_config, model_config)
        self.model = engine.model
        super().__init__(engine, in_process=True, **{"debug": True, **options})


def alone(llm: FakeLLM, prompt: str | list[int], params: SamplingParams) -> list[int]:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return generate_alone(llm.model, ids, params, LIMITS.max_seq_len)[0]


def fail_at(llm: FakeLLM, step: int, error: Exception) -> None:
    """Let the model raise once, at the given step from now on."""
    start = len(llm.model.steps)

    def raise_once(number: int) -> None:
        if number == start + step:
            raise error

    llm.model.before_forward = raise_once


def slow_down(llm: FakeLLM, seconds: float = 0.005) -> None:
    """So that other threads get something done while a request runs."""
    llm.model.before_forward = lambda number: time.sleep(seconds)


def wait_until(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    """For what other threads do in a moment; 10 s is for machines under load."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def assert_idle(llm: LLM) -> None:
    """Nothing runs or waits, and no block is held: neither here nor in the executor."""
    stats = llm.get_stats()
    assert (stats["num_running"], stats["num_waiting"], stats["kv_cache_usage"]) == (0, 0, 0)
    assert stats["api"]["num_unfinished"] == 0


def assert_usable(llm: FakeLLM) -> None:
    wait_until(lambda: llm._frontend.processor.num_unfinished == 0)
    assert_idle(llm)
    llm.model.before_forward = lambda number: None
    output = llm.generate("a fox", GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == alone(llm, "a fox", GREEDY)
