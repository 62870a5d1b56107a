"""Every sampling parameter draws what it should, by chi-square, in one batch of unlike rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from inlay.runtime.request import Request
from inlay.runtime.sampling import SamplingStage
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.chi_square import assert_distributed

VOCAB_SIZE, SAMPLES = 12, 5000
PROMPT, OUTPUT = [1, 2, 3], [4, 4, 5]
LOGITS = np.array(
    [0.9, -0.45, 1.35, 0.15, 1.8, -0.9, 0.6, 1.5, -0.15, 1.05, 0.3, -0.6], dtype=np.float32
)

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.55},
    "low temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.7},
    "bias": {"logit_bias": {0: 1.5, 7: -1.0}},
    "allowed": {"allowed_token_ids": [0, 2, 4, 6]},
    "all": {
        "temperature": 0.7,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.3,
        "logit_bias": {8: 1.0},
        "min_p": 0.02,
        "top_k": 9,
        "top_p": 0.95,
    },
}


def expected(params: SamplingParams) -> np.ndarray:
    """Probabilities by the definitions, one token after the other, in float64."""
    logits = LOGITS.astype(np.float64)
    for token in range(VOCAB_SIZE):
        count = OUTPUT.count(token)
        if token in PROMPT or count:
            x, penalty = logits[token], params.repetition_penalty
            logits[token] = x / penalty if x > 0 else x * penalty
        logits[token] -= params.frequency_penalty * count
        logits[token] -= params.presence_penalty * (count > 0)
        logits[token] += params.bias.get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logits[token] = -np.inf
    p = np.exp(logits / params.temperature)
    p = np.where(p >= params.min_p * p.max(), p, 0) / p.sum()
    p /= p.sum()
    if params.typical_p < 1:
        information = -np.log(p)
        order = np.argsort(abs(information - (p * information).sum()))
        p[order[np.searchsorted(p[order].cumsum(), params.typical_p) + 1 :]] = 0
    order = np.argsort(-p)
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        p[order[np.searchsorted(p[order].cumsum(), params.top_p) + 1 :]] = 0
    return p / p.sum()


@pytest.fixture(scope="module")
def counts() -> dict[str, np.ndarray]:
    """How often each case drew each token: all cases side by side, with SAMPLES seeds each."""
    params = [SamplingParams(**options) for options in CASES.values()]
    stage = SamplingStage(len(params) * SAMPLES, VOCAB_SIZE, torch.device("cpu"))
    requests = []
    for seed in range(SAMPLES):
        for one in params:
            slot = len(requests)
            request = Request("r", [*PROMPT], one, seed, frozenset(), frozenset(), 99, slot=slot)
            request.token_ids += OUTPUT
            requests.append(request)
    plan = stage.plan([(request, 0) for request in requests], requests)
    drawn = stage.launch(plan, torch.from_numpy(LOGITS)[None]).tokens.reshape(SAMPLES, -1)
    return {
        name: np.bincount(drawn[:, i].numpy(), minlength=VOCAB_SIZE) for i, name in enumerate(CASES)
    }


def assert_fits(counts: np.ndarray, probabilities: np.ndarray) -> None:
    possible = probabilities > 0
    assert not counts[~possible].any(), "a token outside the set"
    assert_distributed(counts[possible], probabilities[possible])


@pytest.mark.parametrize("name", CASES)
def test_each_draws_what_it_should(counts: dict[str, np.ndarray], name: str) -> None:
    assert_fits(counts[name], expected(SamplingParams(**CASES[name])))
    assert (expected(SamplingParams(**CASES[name])) > 0).sum() > 2


WRONG = {
    "temperature": {"temperature": 0.55 * 1.1},
    "low temperature": {"temperature": 0.6 * 0.9},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.3},
    "typical_p": {"typical_p": 0.9},
    "repetition": {"repetition_penalty": 1.1},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"presence_penalty": 0.7},
    "bias": {"logit_bias": {0: 1.5, 7: -0.5}},
    "allowed": {"allowed_token_ids": [0, 2, 4, 5]},
    "all": {**CASES["all"], "temperature": 0.7 * 0.8},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_slightly_wrong_does_not_fit(counts: dict[str, np.ndarray], name: str) -> None:
    with pytest.raises(AssertionError):
        assert_fits(counts[name], expected(SamplingParams(**WRONG[name])))
