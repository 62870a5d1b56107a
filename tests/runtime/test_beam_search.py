"""Beam search against transformers' own, driven by the same model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from inlay.errors import RequestError
from inlay.runtime.beam_search import BeamSearch
from inlay.runtime.sampling_params import SamplingParams
from tests.toys import build_toy

VOCAB_SIZE, EOS = 40, (3, 17, 29)
Sequences = list[tuple[list[int], float]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)
    return build_toy("llama", vocab_size=VOCAB_SIZE)


@torch.no_grad()
def search(model: PreTrainedModel, prompt: list[int], **options: Any) -> BeamSearch:
    """Run a search to its end; every step's logits come from whole sequences."""
    params = SamplingParams(use_beam_search=True, **options)
    total = len(prompt) + (params.max_tokens or 0)
    beams = BeamSearch(params, prompt, EOS, params.stop_token_ids or (), total)
    live: list[list[int]] = [prompt]
    for _ in range(total):
        logits = model(torch.tensor(live)).logits[:, -1].float()
        chosen = beams.advance(logits.log_softmax(-1))
        if chosen is None:
            return beams
        assert len(chosen) == beams.width
        live = [[*live[parent], token] for parent, token in chosen]
    raise AssertionError("the search does not end")


def ours(model: PreTrainedModel, prompt: list[int], **options: Any) -> Sequences:
    found = search(model, prompt, **options).hypotheses()
    for one in found:
        length = len(one.token_ids) ** options.get("length_penalty", 1.0)
        assert one.cumulative_logprob / length == pytest.approx(one.score, rel=1e-6)
        ended = one.token_ids[-1] in EOS
        assert one.finish_reason == ("stop" if ended else "length")
        assert not set(one.token_ids[:-1]) & set(EOS)
        assert one.stop_reason is None
    return [(list(one.token_ids), one.score) for one in found]


def theirs(
    model: PreTrainedModel, prompt: list[int], width: int, n: int, max_tokens: int, **options: Any
) -> Sequences:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=width,
        num_return_sequences=n,
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(EOS),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    result = []
    for tokens, score in zip(
        found.sequences.tolist(), found.sequences_scores.tolist(), strict=True
    ):
        output = tokens[len(prompt) :]
        ends = [i for i, token in enumerate(output) if token in EOS]
        result.append((output[: ends[0] + 1] if ends else output, score))
    return result


def assert_same(mine: Sequences, expected: Sequences) -> None:
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in expected]
    scores = torch.tensor([score for _, score in expected])
    # Logits of whole sequences and of transformers' cache differ in the last bits of float32.
    torch.testing.assert_close(
        torch.tensor([score for _, score in mine]), scores, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_equals_transformers(
    model: PreTrainedModel, early_stopping: Any, length_penalty: float
) -> None:
    random.seed(f"{early_stopping} {length_penalty}")
    seen: set[str] = set()
    for width in (2, 3, 4, 5):
        prompt = [random.randrange(VOCAB_SIZE) for _ in range(random.randrange(1, 12))]
        n, max_tokens = random.randint(1, width), random.choice([1, 2, 7, 12])
        options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        mine = ours(model, prompt, n=n, best_of=width, max_tokens=max_tokens, **options)
        assert_same(mine, theirs(model, prompt, width, n, max_tokens, **options))
        assert len(mine) == n
        seen |= {"ended" if tokens[-1] in EOS else "cut" for tokens, _ in mine}
    assert "ended" in seen


@pytest.mark.parametrize(
    ("options", "their_options"),
    [
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"min_tokens": 6}, {"min_new_tokens": 6}),
        (
            {"bad_words_ids": [[4], [5, 6], [20, 7]]},
            {"bad_words_ids": [[4], [5, 6], [20, 7]]},
        ),
        ({"logit_bias": {5: 2.0, 9: -3.0}}, {"sequence_bias": [[[5], 2.0], [[9], -3.0]]}),
    ],
)
def test_with_logits_processors(
    model: PreTrainedModel, options: dict[str, Any], their_options: dict[str, Any]
) -> None:
    changed = False
    for seed in range(4):
        prompt = random.Random(seed).choices(range(VOCAB_SIZE), k=8)
        mine = ours(model, prompt, n=3, best_of=4, max_tokens=10, **options)
        assert_same(mine, theirs(model, prompt, 4, 3, 10, **their_options))
        changed |= mine != ours(model, prompt, n=3, best_of=4, max_tokens=10)
    assert changed


@pytest.mark.slow
def test_equals_transformers_many_times(model: PreTrainedModel) -> None:
    draw = random.Random(1)
    for _ in range(400):
        width = draw.randint(2, 6)
        prompt = draw.choices(range(VOCAB_SIZE), k=draw.randint(1, 20))
        n, max_tokens = draw.randint(1, width), draw.randint(1, 20)
        options = {
            "early_stopping": draw.choice([False, True, "never"]),
            "length_penalty": draw.choice([-1.0, 0.0, 0.3, 1.0, 1.5, 3.0]),
        }
        mine = ours(model, prompt, n=n, best_of=width, max_tokens=max_tokens, **options)
        assert_same(mine, theirs(model, prompt, width, n, max_tokens, **options))


def ban_what_came(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """No token of the output again: what "no n-gram of 1" is without the prompt."""
    logits[output] = -torch.inf
    return logits


def test_the_users_own_processors_see_each_beam(model: PreTrainedModel) -> None:
    options = {"n": 4, "max_tokens": 10, "logits_processors": [ban_what_came]}
    found = ours(model, [5, 6, 7], **options)
    plain = ours(model, [5, 6, 7], n=4, max_tokens=10)
    assert all(len(set(tokens)) == len(tokens) for tokens, _ in found)
    assert any(len(set(tokens)) < len(tokens) for tokens, _ in plain)


def test_stop_tokens_end_a_beam_and_are_named(model: PreTrainedModel) -> None:
    """As further end-of-sequence tokens do, but for the reason."""
    stops, reasons = [token for token in range(0, VOCAB_SIZE, 5) if token not in EOS], set()
    for first in range(4):
        options: dict[str, Any] = {"n": 3, "max_tokens": 10, "stop_token_ids": stops}
        for one in search(model, [first, 2], **options).hypotheses():
            assert not set(one.token_ids[:-1]) & {*stops, *EOS}
            last = one.token_ids[-1]
            assert one.stop_reason == (last if last in stops else None)
            assert one.finish_reason == ("stop" if last in (*stops, *EOS) else "length")
            reasons.add(one.stop_reason)
    assert len(reasons) > 1


def test_fewer_sequences_than_asked_for() -> None:
    """Two tokens are allowed and two may come: of four sequences no fifth is made up."""
    params = SamplingParams(use_beam_search=True, n=5, allowed_token_ids=[1, 2], max_tokens=2)
    beams = BeamSearch(params, [9], (), (), 3)
    chosen = beams.advance(torch.zeros(1, 10).log_softmax(-1))
    assert chosen is not None
    assert beams.advance(torch.zeros(len(chosen), 10).log_softmax(-1)) is None
    found = sorted(one.token_ids for one in beams.hypotheses())
    assert found == [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    ("options", "logits"),
    [
        ({}, torch.full((1, 10), torch.nan)),
        ({"allowed_token_ids": [1], "bad_words_ids": [[1]]}, torch.zeros(1, 10)),
    ],
)
def test_no_token_is_left(options: dict[str, Any], logits: torch.Tensor) -> None:
    params = SamplingParams(use_beam_search=True, n=2, **options)
    with pytest.raises(RequestError, match="beam search has no token to choose from after 0"):
        BeamSearch(params, [9], (), (), 3).advance(logits)


def test_a_processor_that_fails_is_named() -> None:
    params = SamplingParams(use_beam_search=True, n=2, logits_processors=[spoil])
    with pytest.raises(RequestError, match="logits processor 'spoil' gave logits that are NaN"):
        BeamSearch(params, [9], (), (), 3).advance(torch.zeros(1, 10))


def spoil(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits * torch.nan
