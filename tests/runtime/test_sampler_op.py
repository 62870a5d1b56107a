"""The sampler's C++ op against the Python form that stands in for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from inlay.backends.kernels.cpu_ops import load_ops
from inlay.runtime.sampler import NO_TOKEN, Sampler
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.test_sampler import CPU, MIXED

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


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    load_ops()


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        torch.ops.inlay_cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.inlay_cpu.set_isa("auto")


def both(params: list[SamplingParams] = KINDS) -> tuple[Sampler, Sampler]:
    """A sampler by the op, and one by Python."""
    found = []
    for _ in range(2):
        sampler = Sampler(len(params), CPU)
        for slot, one in enumerate(params):
            sampler.set_slot(slot, one, one.seed or 0)
        found.append(sampler)
    assert found[0]._op is not None
    found[1]._op = None
    return found[0], found[1]


def rows(vocab_size: int, spread: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(KINDS), vocab_size, generator=generator) * spread


@pytest.mark.parametrize("vocab_size", [1, 7, 129, 3001, 18005])
@pytest.mark.parametrize("spread", [0.01, 2.0, 8.0])
def test_the_same_tokens(isa: str, vocab_size: int, spread: float) -> None:
    """Sums of weights are rounded in another order here: a set may end elsewhere only where one
    token's weight decides within 1e-6, which none of these rows does."""
    op, python = both()
    for position in range(3):
        logits = rows(vocab_size, spread, position)
        for given in (logits, logits.round(), logits.bfloat16(), logits.half()):
            at = SLOTS, np.full(len(SLOTS), position)
            expected = python.sample(given, *at)
            assert op.sample(given, *at).tolist() == expected.tolist()
            assert torch.equal(op.last_tokens, python.last_tokens)


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_largest(isa: str, size: int, dtype: torch.dtype) -> None:
    op, _ = both([SamplingParams(temperature=0)] * 50)
    logits = torch.randint(-3, 3, (50, size), generator=torch.Generator().manual_seed(size))
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert op.sample(logits.to(dtype), np.arange(50), np.arange(50)).tolist() == expected


def test_masked_rows_and_rows_with_nothing_to_choose(isa: str) -> None:
    logits = rows(700, 1.0, 0)
    logits[:, 5:] = -torch.inf
    op, python = both()
    assert op.sample(logits, SLOTS, SLOTS).tolist() == python.sample(logits, SLOTS, SLOTS).tolist()
    for rest in (torch.nan, -torch.inf, torch.inf):
        logits[:] = -torch.inf
        logits[:, 699] = rest
        assert op.sample(logits, SLOTS, SLOTS).tolist() == [NO_TOKEN] * len(KINDS)


def test_it_does_not_depend_on_threads_rows_or_strides() -> None:
    op, _ = both()
    logits = rows(40_000, 1.0, 1)
    expected = op.sample(logits, SLOTS, SLOTS).tolist()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert op.sample(logits, SLOTS, SLOTS).tolist() == expected
    finally:
        torch.set_num_threads(before)
    wide = torch.cat((logits, logits), 1)[:, :40_000]
    assert op.sample(wide, SLOTS, SLOTS).tolist() == expected
    assert op.sample(logits.t().contiguous().t(), SLOTS, SLOTS).tolist() == expected
    order = SLOTS[::-1].copy()
    assert op.sample(logits.flip(0), order, order).tolist() == expected[::-1]
    assert op.sample(logits[:0], SLOTS[:0], SLOTS[:0]).tolist() == []


def test_rows_with_typical_p_go_by_python() -> None:
    params = [SamplingParams(seed=1, typical_p=0.5), SamplingParams(seed=2, top_p=0.9)]
    op, python = both(params)
    logits, at = torch.randn(2, 300), np.arange(2)
    assert op.sample(logits, at, at).tolist() == python.sample(logits, at, at).tolist()


def test_wrong_arguments_are_refused() -> None:
    call, slots = torch.ops.inlay_cpu.draw_tokens, torch.arange(2)
    integers, floats = torch.zeros(3, 4, dtype=torch.int64), torch.ones(4, 4).double()
    with pytest.raises(RuntimeError, match="logits must be"):
        call(torch.zeros(2, 9).double(), slots, slots, integers, floats)
    with pytest.raises(RuntimeError, match="positions must be"):
        call(torch.zeros(2, 9), slots, slots[:1], integers, floats)
    with pytest.raises(RuntimeError, match="floats must be"):
        call(torch.zeros(2, 9), slots, slots, integers, floats.float())
    with pytest.raises(RuntimeError, match=r"slots\[1\] is 4, there are 4"):
        call(torch.zeros(2, 9), slots + 3, slots, integers, floats)
