"""The stage as the executor drives it: planned ahead, launched in another thread, read late."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from inlay.runtime.request import Request
from inlay.runtime.sampler import NO_TOKEN
from inlay.runtime.sampling import SampledToken, SamplingStage
from inlay.runtime.sampling_params import SamplingParams

CPU, VOCAB_SIZE = torch.device("cpu"), 300

UNLIKE = [
    {"temperature": 0},
    {},
    {"top_k": 5, "repetition_penalty": 1.5},
    {"top_p": 0.8, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"temperature": 0, "repetition_penalty": 3.0},
    {"min_p": 0.05, "logit_bias": {4: 2.0}, "temperature": 0.7},
    {"typical_p": 0.7, "min_tokens": 4},
    {"allowed_token_ids": [3, 4, 5, 6, 7], "bad_words_ids": [[6]]},
    {"logprobs": 3, "temperature": 1.3},
    {"n": 1, "best_of": 2},
]
PARAMS = [SamplingParams(**options, max_tokens=None) for options in UNLIKE]


def make_request(params: SamplingParams, slot: int, seed: int = 5) -> Request:
    prompt = [slot + 1, 2, 7]
    return Request("r", prompt, params, seed, frozenset(), frozenset({9}), 100, slot=slot)


def logits_at(row: int, step: int) -> torch.Tensor:
    """[vocab]; they do not depend on the tokens, so that steps can be launched ahead."""
    generator = torch.Generator().manual_seed(1000 * row + step)
    return torch.randn(VOCAB_SIZE, generator=generator) * 3


def alone(params: SamplingParams, row: int, steps: int) -> list[SampledToken]:
    """One request in a stage of its own, every token read before the next is planned."""
    stage, request = SamplingStage(1, VOCAB_SIZE, CPU), make_request(params, row)
    request.slot, found = 0, []
    for step in range(steps):
        plan = stage.plan([(request, 0)], [request] if step == 0 else [])
        found += stage.read(stage.launch(plan, logits_at(row, step)[None]))
        request.token_ids.append(found[-1].token_id)
    return found


@pytest.mark.parametrize("lag", [0, 1])
def test_unlike_requests_together_overlapped_and_shuffled(lag: int) -> None:
    """Each gets the tokens it gets alone, though the host knows them a step late."""
    steps, count = 8, len(PARAMS)
    stage = SamplingStage(count + 1, VOCAB_SIZE, CPU)
    requests = [make_request(one, row) for row, one in enumerate(PARAMS)]
    for row, request in enumerate(requests):
        request.slot = count - row
    results: list[list[SampledToken]] = [[] for _ in requests]
    flying: list[tuple[list[int], Any]] = []

    def take(order: list[int], future: Any) -> None:
        for row, token in zip(order, stage.read(future.result()), strict=True):
            request = requests[row]
            request.token_ids[request.num_prompt_tokens + len(results[row])] = token.token_id
            results[row].append(token)

    with ThreadPoolExecutor(1) as thread:
        for step in range(steps):
            order = [(row * 3 + step) % count for row in range(count)]
            assert not any(requests[row].needs_history for row in order)
            new = requests if step == 0 else []
            plan = stage.plan([(requests[row], i) for i, row in enumerate(order)], new)
            logits = torch.stack([logits_at(row, step) for row in order])
            flying.append((order, thread.submit(stage.launch, plan, logits)))
            for request in requests:
                request.token_ids.append(-1)
            while len(flying) > lag:
                take(*flying.pop(0))
        while flying:
            take(*flying.pop(0))
    for row, one in enumerate(PARAMS):
        assert results[row] == alone(one, row, steps), UNLIKE[row]


def test_rows_share_a_row_of_the_logits() -> None:
    params = SamplingParams(repetition_penalty=1.4, logprobs=2, top_k=20)
    stage = SamplingStage(8, VOCAB_SIZE, CPU)
    requests = [make_request(params, slot, seed=slot) for slot in range(5)]
    logits = torch.stack([logits_at(row, 0) for row in range(4)])
    kept = logits.clone()
    rows = [2, 0, 2, 2, 1]
    plan = stage.plan(list(zip(requests, rows, strict=True)), requests)
    tokens = stage.read(stage.launch(plan, logits))
    assert torch.equal(logits, kept)
    for request, row, token in zip(requests, rows, tokens, strict=True):
        other = SamplingStage(8, VOCAB_SIZE, CPU)
        plan = other.plan([(request, 0)], [request])
        assert other.read(other.launch(plan, logits[row : row + 1])) == [token]
    assert len({tokens[0].token_id, tokens[2].token_id, tokens[3].token_id}) > 1
    assert stage.last_tokens[:5].tolist() == [token.token_id for token in tokens]


def test_a_preempted_request_goes_on_in_another_slot() -> None:
    """Its counts come back from its tokens; the slot's next holder does not inherit them."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    expected = [token.token_id for token in alone(params, 0, 6)]
    stage, request = SamplingStage(3, VOCAB_SIZE, CPU), make_request(params, 0)
    other = make_request(replace(params, presence_penalty=0.1), 1)
    other.slot = 0
    for step in range(6):
        if step == 3:
            request.slot = 2
        new = [request] if step in (0, 3) else []
        plan = stage.plan([(request, 0)], new)
        (token,) = stage.read(stage.launch(plan, logits_at(0, step)[None]))
        request.token_ids.append(token.token_id)
    assert request.token_ids[3:] == expected
    plan = stage.plan([(other, 0)], [other])
    (token,) = stage.read(stage.launch(plan, logits_at(1, 0)[None]))
    assert token == alone(other.params, 1, 1)[0]


def test_logprobs_are_of_the_models_logits() -> None:
    stage, ask = SamplingStage(3, VOCAB_SIZE, CPU), SamplingParams(temperature=0, logprobs=2)
    requests = [
        make_request(replace(ask, logit_bias={50: 100.0}), 0),
        make_request(SamplingParams(n=2, best_of=4, logit_bias={60: 100.0}), 1),
        make_request(SamplingParams(n=4, temperature=0.1), 2),
    ]
    logits = torch.stack([logits_at(row, 0) for row in range(3)])
    plan = stage.plan([(request, row) for row, request in enumerate(requests)], requests)
    first, second, third = stage.read(stage.launch(plan, logits))
    log_p = logits.double().log_softmax(-1)
    assert (first.token_id, second.token_id) == (50, 60)
    assert first.logprob == pytest.approx(float(log_p[0, 50]), rel=1e-9)
    assert first.logprobs is not None
    assert set(first.logprobs) == {50, *log_p[0].topk(2).indices.tolist()}
    assert second.logprob == pytest.approx(float(log_p[1, 60]), rel=1e-9)
    assert second.logprobs is None
    assert (third.logprob, third.logprobs) == (None, None)


def test_no_rows() -> None:
    stage = SamplingStage(2, VOCAB_SIZE, CPU)
    assert stage.read(stage.launch(stage.plan([], []), torch.zeros(4, VOCAB_SIZE))) == []


@pytest.mark.parametrize("options", UNLIKE[:4])
def test_one_nan_is_enough_to_refuse_a_row(options: dict[str, Any]) -> None:
    stage = SamplingStage(2, VOCAB_SIZE, CPU)
    requests = [make_request(SamplingParams(**options, logprobs=1), slot) for slot in range(2)]
    logits = torch.randn(2, VOCAB_SIZE)
    logits[1, 77] = torch.nan
    plan = stage.plan([(requests[0], 0), (requests[1], 1)], requests)
    good, bad = stage.read(stage.launch(plan, logits))
    assert good.token_id != NO_TOKEN
    assert bad == SampledToken(NO_TOKEN)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"min_tokens": 3, "repetition_penalty": 2, "bad_words_ids": [[3]]}, False),
        ({"no_repeat_ngram_size": 2}, True),
        ({"bad_words_ids": [[3], [4, 5]]}, True),
        ({"logits_processors": ["a:B"]}, True),
        ({"use_beam_search": True, "n": 2}, True),
    ],
)
def test_what_needs_history(options: dict[str, Any], expected: bool) -> None:
    assert make_request(SamplingParams(**options), 0).needs_history is expected
