from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TypicalLogitsWarper

from inlay.runtime.draws import (
    lowest_kept,
    sample_plain,
    sample_truncated,
    typical_mask,
)
from inlay.runtime.noise import gumbel, row_keys
from inlay.runtime.sampler import Sampler
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.chi_square import assert_distributed

CPU = torch.device("cpu")
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=5),
    SamplingParams(seed=3, top_p=0.7),
    SamplingParams(seed=4, top_k=40, top_p=0.5, temperature=1.7),
    SamplingParams(seed=2**64 - 1, temperature=0.3),
    SamplingParams(seed=5, top_p=0.999, temperature=4.0),
    SamplingParams(seed=6, top_k=-1, top_p=1.0),
]


def make_sampler(params: list[SamplingParams]) -> Sampler:
    sampler = Sampler(len(params), CPU)
    for slot, one in enumerate(params):
        sampler.set_slot(slot, one, one.seed or 0)
    return sampler


def kept_set(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> set[int]:
    """Naive top-k, then top-p among what is left; equal logits share one fate."""
    scaled = logits.astype(np.float64) / temperature
    kept = set(range(len(scaled)))
    if top_k > 0:
        kept = {i for i in kept if (scaled > scaled[i]).sum() < top_k}
    if top_p < 1:
        left = np.array(sorted(kept))
        weights = np.exp(scaled[left] - scaled.max())
        limit = top_p * weights.sum()
        held = {value: weights[scaled[left] > value].sum() for value in set(scaled[left])}
        kept = {i for i in kept if held[scaled[i]] < limit}
    return kept


def naive_sample(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    if params.is_greedy:
        return int(logits.argmax())
    kept = sorted(kept_set(logits, params.temperature, params.top_k, params.top_p))
    seed = (params.seed or 0) - (2**64 if (params.seed or 0) >= 2**63 else 0)
    keys = row_keys(torch.tensor([seed]), torch.tensor([position]))
    noise = gumbel(keys, torch.tensor(kept, dtype=torch.int32))[0].double().numpy()
    return kept[int((logits[kept].astype(np.float64) / params.temperature + noise).argmax())]


@pytest.mark.parametrize("vocab_size", [33, 500, 3001])
def test_equals_naive_sampling(vocab_size: int) -> None:
    """Every kind of request, in one batch, at several positions."""
    rng = np.random.default_rng(vocab_size)
    sampler = make_sampler(MIXED)
    slots = np.arange(len(MIXED))
    for position in range(6):
        logits = rng.normal(0, 2, (len(MIXED), vocab_size)).astype(np.float32)
        positions = np.full(len(MIXED), position)
        tokens = sampler.sample(torch.from_numpy(logits), slots, positions)
        expected = [naive_sample(logits[i], MIXED[i], position) for i in slots]
        assert tokens.tolist() == expected
        assert sampler.last_tokens.tolist() == expected


def test_does_not_depend_on_batch_or_slot() -> None:
    """Alone, reversed, in other slots, beside others: the same tokens."""
    torch.manual_seed(0)
    count = len(MIXED)
    logits, positions = torch.randn(count, 1531) * 3, np.arange(count) * 11
    together = make_sampler(MIXED).sample(logits, np.arange(count), positions).tolist()
    backwards = make_sampler(MIXED[::-1])
    order = np.arange(count)[::-1].copy()
    assert backwards.sample(logits, order, positions).tolist() == together
    for row in range(count):
        alone = make_sampler([MIXED[row]])
        picked = alone.sample(logits[row : row + 1], np.array([0]), positions[row : row + 1])
        assert picked.tolist() == [together[row]]


def test_a_slot_forgets_its_last_request() -> None:
    logits, at = torch.randn(1, 400), (np.array([0]), np.array([5]))
    for params in [*MIXED, *MIXED[::-1]]:
        sampler = make_sampler([params])
        used = make_sampler([MIXED[4]])
        used.set_slot(0, params, params.seed or 0)
        assert used.sample(logits, *at).tolist() == sampler.sample(logits, *at).tolist()


def test_rows_beyond_the_slots_are_padding() -> None:
    logits = torch.randn(4, 50)
    logits[2:] = torch.nan
    sampler = Sampler(8, CPU)
    for slot in (6, 1):
        sampler.set_slot(slot, SamplingParams(seed=slot), slot)
    tokens = sampler.sample(logits, np.array([6, 1]), np.array([3, 4]))
    assert tokens.shape == (2,)
    assert sampler.last_tokens[[6, 1]].tolist() == tokens.tolist()
    assert sampler.last_tokens[[0, 2, 3, 4, 5, 7]].tolist() == [0] * 6


def test_logits_are_left_alone() -> None:
    logits = torch.randn(len(MIXED), 300)
    before = logits.clone()
    make_sampler(MIXED).sample(logits, np.arange(len(MIXED)), np.zeros(len(MIXED), dtype=np.int64))
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 39, 40, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("with_ties", [False, True])
def test_top_k_top_p_sets_are_exact(top_k: int, top_p: float, with_ties: bool) -> None:
    rng = np.random.default_rng(17)
    rows = rng.normal(0, 2, (20, 40)).astype(np.float32)
    if with_ties:
        rows = rows.round()
    rows -= rows.max(-1, keepdims=True)
    k, p = torch.full((20,), top_k), torch.full((20,), top_p, dtype=torch.float64)
    lowest = lowest_kept(torch.from_numpy(rows), k, p).numpy()
    for row in range(20):
        kept = set(np.flatnonzero(rows[row] >= lowest[row]).tolist())
        assert kept == kept_set(rows[row], 1.0, top_k, top_p)


SETS = [(3, 1.0), (0, 0.9), (0, 0.99999), (1000, 0.97), (127, 0.5), (1, 1.0), (0, 1e-9), (64, 0.9)]
ROWS = {
    "normal": torch.randn(4, 1300, generator=torch.Generator().manual_seed(1)) * 2,
    "nearly flat": torch.randn(4, 1300, generator=torch.Generator().manual_seed(2)) * 0.01,
    "tied": torch.zeros(4, 1300),
    "many ties": torch.randn(4, 1300, generator=torch.Generator().manual_seed(3)).round(),
    "mostly masked": torch.randn(4, 1300, generator=torch.Generator().manual_seed(4)),
}
ROWS["mostly masked"][:, 5:] = -torch.inf


@pytest.mark.parametrize(("top_k", "top_p"), SETS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_way_to_a_token_is_the_same(rows: str, top_k: int, top_p: float) -> None:
    """The race of a CPU and the bisection of other devices: one answer, the naive."""
    logits = ROWS[rows]
    scaled = logits - logits.amax(-1, keepdim=True)
    keys = row_keys(torch.arange(4), torch.arange(4))
    k, p = torch.full((4,), top_k), torch.full((4,), top_p, dtype=torch.float64)
    lowest = lowest_kept(scaled, k, p)
    expected = []
    for row in range(4):
        kept = sorted(kept_set(scaled[row].numpy(), 1.0, top_k, top_p))
        assert sorted((scaled[row] >= lowest[row]).nonzero()[:, 0].tolist()) == kept
        noise = gumbel(keys[row : row + 1], torch.tensor(kept, dtype=torch.int32))[0]
        expected.append(kept[int((noise.double() + scaled[row, kept].double()).argmax())])
    assert sample_truncated(scaled, keys, k, p).tolist() == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (40, 0.9), (400, 1.0), (0, 0.999)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_a_few_give_what_all_give(top_k: int, top_p: float, spread: float) -> None:
    """A vocabulary that is large enough to be narrowed, and with a rest behind the blocks."""
    logits = torch.randn(12, 18005, generator=torch.Generator().manual_seed(5)) * spread
    scaled = logits - logits.amax(-1, keepdim=True)
    keys = row_keys(torch.arange(12), torch.arange(12))
    k, p = torch.full((12,), top_k), torch.full((12,), top_p, dtype=torch.float64)
    lowest = lowest_kept(scaled, k, p)
    masked = scaled.masked_fill(scaled < lowest[:, None], -torch.inf)
    expected = gumbel(keys, torch.arange(18005, dtype=torch.int32)).add_(masked).argmax(-1)
    assert torch.equal(sample_truncated(scaled, keys, k, p), expected)


@pytest.mark.parametrize("rest", [np.nan, -np.inf, 0.0])
def test_a_race_ends_though_there_is_nothing_to_choose(rest: float) -> None:
    scaled = torch.full((1, 9), rest)
    scaled[0, 3] = torch.nan
    top_p = torch.full((1,), 0.5, dtype=torch.float64)
    for top_k in (0, 2):
        sample_truncated(scaled, torch.tensor([7]), torch.tensor([top_k]), top_p)


@pytest.mark.parametrize("by", ["seed", "position"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8, temperature=1.5),
        SamplingParams(top_k=8, top_p=0.7),
    ],
)
def test_tokens_follow_their_probabilities(params: SamplingParams, by: str) -> None:
    count, logits = 20_000, np.random.default_rng(5).normal(0, 1, 12).astype(np.float32)
    seeds = np.arange(count) if by == "seed" else np.full(count, 7)
    positions = np.arange(count) if by == "position" else np.full(count, 7)
    sampler = Sampler(count, CPU)
    slots = enumerate(seeds.tolist())
    sampler.launch_slots(sampler.plan_slots([(slot, params, seed) for slot, seed in slots]))
    rows = torch.from_numpy(logits).expand(count, -1)
    tokens = sampler.sample(rows, np.arange(count), positions).numpy()
    kept = sorted(kept_set(logits, params.temperature, params.top_k, params.top_p))
    counts = np.bincount(tokens, minlength=12)
    assert counts.sum() == counts[kept].sum(), "a token outside the top-k / top-p set"
    probabilities = np.exp(logits[kept].astype(np.float64) / params.temperature)
    assert_distributed(counts[kept], probabilities)


def test_a_large_vocabulary_is_sampled_evenly() -> None:
    """Equal logits over 150,000 tokens: every stretch of ids gets its share."""
    rows = torch.zeros(40, 150_000)
    tokens = []
    for batch in range(8):
        keys = row_keys(torch.full((40,), 5), torch.arange(40) + 40 * batch)
        tokens += sample_plain(rows, keys).tolist()
    counts = np.bincount(np.array(tokens) // 18750, minlength=8)
    assert_distributed(counts, np.full(8, 1 / 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(len(MIXED), 200) * 4).to(dtype)
    slots, positions = np.arange(len(MIXED)), np.arange(len(MIXED))
    tokens = make_sampler(MIXED).sample(logits, slots, positions).tolist()
    expected = [naive_sample(logits[i].float().numpy(), MIXED[i], i) for i in range(len(MIXED))]
    assert tokens == expected


def test_low_temperatures_are_nearly_greedy() -> None:
    logits = torch.randn(1, 1000) * 50
    for temperature in (1e-5, 1e-4, 1e-3):
        sampler = make_sampler([SamplingParams(temperature=temperature, seed=1)])
        token = sampler.sample(logits, np.array([0]), np.array([0]))
        assert token.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9, 0.999])
def test_typical_tokens_are_those_of_transformers(p: float) -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(3)) * 2
    theirs = TypicalLogitsWarper(p)(torch.zeros(20, 1), logits.double()) > -torch.inf
    ours = typical_mask(logits - logits.amax(-1, keepdim=True), torch.full((20,), p).double())
    assert torch.equal(ours, theirs)
    assert ours.any(-1).all()


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
        ({"typical_p": 0.4}, TypicalLogitsWarper(0.4)),
        ({"min_p": 0.1, "top_k": 3}, TopKLogitsWarper(3)),
    ],
)
def test_min_p_and_typical_p_are_distributed_as_those_of_transformers(
    options: dict[str, float], warper: LogitsProcessor
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).float()
    scores = warper(torch.zeros(1, 1), logits.clone())
    if "top_k" in options:
        scores = MinPLogitsWarper(0.1)(torch.zeros(1, 1), scores)
    sampler = make_sampler([SamplingParams(**options)])  # type: ignore[arg-type]
    slot, places = np.array([0]), [np.array([place]) for place in range(4000)]
    tokens = [int(sampler.sample(logits, slot, place)) for place in places]
    counts, expected = np.bincount(tokens, minlength=12), scores.softmax(-1)[0].double().numpy()
    assert not counts[expected == 0].any()
    assert 1 < (expected > 0).sum() < 12
    assert_distributed(counts[expected > 0], expected[expected > 0])
