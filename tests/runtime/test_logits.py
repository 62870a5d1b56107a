"""Penalties, biases and bans against transformers' own logits processors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from inlay.errors import RequestError
from inlay.runtime.executor import Executor
from inlay.runtime.logits import LogitsProcessor
from inlay.runtime.request import NewRequest, Request
from inlay.runtime.sampler import NO_TOKEN, Sampler
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, assert_nothing_held, run_all

CPU, VOCAB_SIZE, EOS = torch.device("cpu"), 50, 7
PROMPT = [3, 4, 5, 3, 4, 5, 9, 3, 4]
OUTPUT = [5, 20, 21, 20, 3, 4]

CASES: dict[str, tuple[dict[str, Any], hf.LogitsProcessor]] = {
    "repetition": (
        {"repetition_penalty": 1.7},
        hf.RepetitionPenaltyLogitsProcessor(1.7),
    ),
    "n-grams of 2": ({"no_repeat_ngram_size": 2}, hf.NoRepeatNGramLogitsProcessor(2)),
    "n-grams of 3": ({"no_repeat_ngram_size": 3}, hf.NoRepeatNGramLogitsProcessor(3)),
    "no token twice": ({"no_repeat_ngram_size": 1}, hf.NoRepeatNGramLogitsProcessor(1)),
    "bad words": (
        {"bad_words_ids": [[4], [3, 4, 11], [9, 12]]},
        hf.NoBadWordsLogitsProcessor([[4], [3, 4, 11], [9, 12]]),
    ),
    "a bias": (
        {"logit_bias": {2: 3.0, 4: -8.0}},
        hf.SequenceBiasLogitsProcessor({(2,): 3.0, (4,): -8.0}),
    ),
    "a minimum": (
        {"min_tokens": len(OUTPUT) + 1},
        hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), len(OUTPUT) + 1, [EOS], device="cpu"),
    ),
    "a minimum that is reached": (
        {"min_tokens": len(OUTPUT)},
        hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), len(OUTPUT), [EOS], device="cpu"),
    ),
    "allowed tokens": (
        {"allowed_token_ids": [1, 4, 7]},
        hf.PrefixConstrainedLogitsProcessor(lambda batch, ids: [1, 4, 7], 1),
    ),
}


def request_of(params: SamplingParams) -> Request:
    request = Request("r", list(PROMPT), params, 0, frozenset(), frozenset({EOS}), 100)
    request.token_ids += OUTPUT
    return request


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("case", CASES)
def test_each_is_what_transformers_has(case: str) -> None:
    options, theirs = CASES[case]
    ours = LogitsProcessor(4, VOCAB_SIZE, CPU)
    ours.set_slot(2, request_of(SamplingParams(**options)))
    logits = logits_of(1)
    expected = theirs(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    result = ours.apply(logits, np.array([2]))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert "reached" in case or not torch.equal(result, logits)


def test_many_requests_that_differ_and_grow() -> None:
    """In one batch, in other slots, padded, as they go on: each as if it were alone."""
    together = LogitsProcessor(len(CASES) + 2, VOCAB_SIZE, CPU)
    requests = {slot: request_of(SamplingParams()) for slot in range(len(CASES) + 2)}
    for slot, (options, _) in enumerate(CASES.values()):
        requests[slot].params = SamplingParams(**options, presence_penalty=0.5)
    slots = np.array([*reversed(range(len(CASES) + 1))])
    for slot in slots:
        together.set_slot(int(slot), requests[slot])
    for step in range(6):
        logits = logits_of(len(slots) + 3)
        result = together.apply(logits, slots)
        for row, slot in enumerate(slots):
            alone = LogitsProcessor(1, VOCAB_SIZE, CPU)  # as after a preemption
            alone.set_slot(0, requests[slot])
            expected = alone.apply(logits[row : row + 1], np.array([0]))[0]
            torch.testing.assert_close(result[row], expected, rtol=0, atol=0)
        tokens = torch.tensor([(3 * step + 5 * row) % VOCAB_SIZE for row in range(len(slots))])
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            requests[slot].token_ids.append(token)
        together.observe(slots, tokens)


def test_penalties_of_the_output_alone() -> None:
    processor = LogitsProcessor(1, VOCAB_SIZE, CPU)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    processor.set_slot(0, request_of(params))
    change = processor.apply(torch.zeros(1, VOCAB_SIZE), np.array([0]))[0]
    assert (change[20], change[21], change[9]) == (-1.0, -0.75, 0.0)


def test_rows_that_ask_for_nothing_are_not_touched() -> None:
    processor, logits = LogitsProcessor(2, VOCAB_SIZE, CPU), logits_of(2)
    processor.set_slot(0, request_of(SamplingParams()))
    assert processor.apply(logits, np.array([0])) is logits
    processor.set_slot(1, request_of(SamplingParams(logit_bias={1: 1.0})))
    result = processor.apply(logits, np.array([0, 1]))
    assert torch.equal(result[0], logits[0])
    assert not torch.equal(result[1], logits[1])
    processor.set_slot(1, request_of(SamplingParams()))  # the next request in that slot
    assert processor.apply(logits, np.array([0, 1])) is logits


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_request_without_any_token_fails_alone(temperature: float) -> None:
    executor = Executor(FakeModel())
    good = SamplingParams(temperature=temperature, seed=1, max_tokens=6)
    executor.add_request(NewRequest("right", [1, 2, 3], good))
    bad = replace(good, allowed_token_ids=[5], bad_words_ids=[[5]])
    executor.add_request(NewRequest("none left", [1, 2, 3], bad))
    results = run_all(executor)
    assert results["none left"] == ([], "error")
    assert len(results["right"][0]) == 6
    assert_nothing_held(executor)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_rows_of_nan(options: dict[str, Any], poison: float) -> None:
    sampler = Sampler(2, CPU)
    for slot in range(2):
        sampler.set_slot(slot, SamplingParams(**options), 1)
    logits = torch.randn(2, 600)
    logits[1] = poison
    tokens = sampler.sample(logits, np.array([0, 1]), np.array([5, 5]))
    assert tokens[0] != NO_TOKEN
    assert tokens[1] == NO_TOKEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, r"min_p must be a number in \[0, 1\]"),
        ({"typical_p": 0}, "typical_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"presence_penalty": 3}, r"presence_penalty must be a number in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be an integer >= 0"),
        ({"min_tokens": 20}, r"min_tokens must be at most max_tokens \(16\)"),
        ({"logit_bias": {"a": 1.0}}, r"logit_bias must be \{token id: number"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be"),
        ({"logit_bias": [1, 2]}, "logit_bias must be"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be None or a list that is not empty"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids must be a list of token ids >= 0"),
        ({"bad_words": [""]}, "bad_words must be a string or a list of strings"),
    ],
)
def test_values_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_token_ids": [97]},
        {"logit_bias": {97: 1.0}},
        {"bad_words_ids": [[3, 97]]},
    ],
)
def test_tokens_that_the_model_does_not_have(options: dict[str, Any]) -> None:
    executor = Executor(FakeModel())
    with pytest.raises(RequestError, match=rf"{next(iter(options))} must be integers in \[0, 97\)"):
        executor.add_request(NewRequest("r", [1], SamplingParams(**options)))
