"""Sampling on a GPU against the form of it that runs on a CPU, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inlay.backends.kernels.triton.sampling import draw_tokens
from inlay.runtime.sampler import NO_TOKEN, Sampler
from inlay.runtime.sampling_params import SamplingParams
from tests.kernels.interpreted import poisoned  # noqa: F401
from tests.runtime.test_sampler import CPU, MIXED

pytestmark = pytest.mark.filterwarnings("ignore:.*overflow.*:RuntimeWarning")

KINDS = [
    *MIXED,
    SamplingParams(seed=8, min_p=0.05),
    SamplingParams(seed=9, min_p=0.2, top_k=7, temperature=2.0),
    SamplingParams(seed=10, top_p=0.9),
    SamplingParams(seed=11, top_k=600, top_p=0.97),
    SamplingParams(seed=12, top_k=1_000_000),
    SamplingParams(seed=13, top_p=1e-9),
    SamplingParams(seed=14, temperature=1e-5),
    SamplingParams(seed=15, top_k=1),
]
SLOTS = np.arange(len(KINDS))


def make(kernel: bool) -> Sampler:
    sampler = Sampler(len(KINDS), CPU)
    for slot, params in enumerate(KINDS):
        sampler.set_slot(slot, params, params.seed or 0)
    sampler._op = draw_tokens if kernel else None
    return sampler


@pytest.mark.parametrize("vocab_size", [1, 129, pytest.param(9001, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_the_same_tokens(vocab_size: int, spread: float) -> None:
    """Logarithms and sums of weights are rounded otherwise here: a token may differ only where two
    are within about 1e-6 of each other, which none of these rows has."""
    kernel, python = make(True), make(False)
    logits = torch.randn(len(KINDS), vocab_size) * spread
    for given in (logits, logits.round(), logits.half()):
        expected = python.sample(given, SLOTS, SLOTS)
        assert kernel.sample(given, SLOTS, SLOTS).tolist() == expected.tolist()
    if vocab_size > 100:  # another position's noise gives other tokens
        assert python.sample(given, SLOTS, SLOTS + 9).tolist() != expected.tolist()


def test_masked_rows_and_rows_with_nothing_to_choose() -> None:
    kernel, python = make(True), make(False)
    logits = torch.randn(len(KINDS), 700)
    logits[:, 5:] = -torch.inf
    expected = python.sample(logits, SLOTS, SLOTS).tolist()
    assert kernel.sample(logits, SLOTS, SLOTS).tolist() == expected
    for rest in (torch.nan, -torch.inf, torch.inf):
        logits[:] = -torch.inf
        logits[:, 699] = rest
        assert kernel.sample(logits, SLOTS, SLOTS).tolist() == [NO_TOKEN] * len(KINDS)
    assert kernel.sample(logits[:0], SLOTS[:0], SLOTS[:0]).tolist() == []
