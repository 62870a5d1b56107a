from __future__ import annotations

from typing import Any

import pytest

from inlay.backends.base import ModelLimits
from inlay.errors import RequestError
from inlay.runtime.admission import Admission
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, run_all

LIMITS = ModelLimits(97, max_seq_len=64, max_num_tokens=24, max_num_seqs=6, block_size=4)


def admission(*num_blocks: int, windows: tuple[int, ...] = (0, 5)) -> Admission:
    return Admission(LIMITS, windows[: len(num_blocks)], num_blocks)


@pytest.mark.parametrize("options", [{"n": 7}, {"n": 2, "best_of": 7}, {"n": 7, "beams": True}])
def test_more_sequences_than_can_run_at_once(options: dict[str, Any]) -> None:
    is_beams = options.pop("beams", False)
    params = SamplingParams(use_beam_search=is_beams, max_tokens=1, **options)
    with pytest.raises(RequestError, match=r"has 7 sequences.*max_num_seqs is 6"):
        admission(1000, 1000).check([1], params)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "n", "needed"),
    [
        (8, 4, 1, 3),
        (9, 4, 1, 4),
        (8, 4, 3, 3 + 2 * 1),  # two blocks of the prompt are shared
        (9, 4, 3, 4 + 2 * 2),
        (1, None, 1, 16),
        (60, 10, 1, 16),  # no more than max_seq_len
    ],
)
def test_a_request_that_can_never_fit(
    prompt: int, max_tokens: int | None, n: int, needed: int
) -> None:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    assert len(admission(needed).check([1] * prompt, params)) == prompt
    with pytest.raises(RequestError, match=rf"{needed} blocks.*which has {needed - 1} blocks"):
        admission(needed - 1).check([1] * prompt, params)


def test_windows_need_no_more_than_they_hold() -> None:
    """64 tokens are 16 blocks, of which a window of 5 and two steps of 24 hold 14."""
    params = SamplingParams(max_tokens=None)
    assert admission(16, 14).check([1], params) == [1]
    with pytest.raises(RequestError, match="14 blocks"):
        admission(16, 13).check([1], params)
    assert admission(14, windows=(5,)).check([1], params) == [1]


@pytest.mark.parametrize("windows", [(0,), (0, 5), (5,), (0, 30)])
@pytest.mark.parametrize("kv_cache_tokens", [32, 40, 64])
def test_whatever_is_let_in_runs_to_its_end(windows: tuple[int, ...], kv_cache_tokens: int) -> None:
    """With n, best_of and beams, in the smallest caches; what is refused says why."""
    num_refused = 0
    for prompt in (1, 4, 7, 16, 20):
        for options in ({"n": 1}, {"n": 3}, {"best_of": 4}, {"n": 2, "use_beam_search": True}):
            config = ExecutorConfig(kv_cache_tokens=kv_cache_tokens, debug=True)
            executor = Executor(FakeModel(windows=windows), config)
            params = SamplingParams(**options, max_tokens=13)
            try:
                executor.add_request(NewRequest("r", [5] * prompt, params))
            except RequestError as error:
                assert "may grow to" in str(error)  # noqa: PT017
                num_refused += 1
                continue
            for _ in range(40):
                executor.step()
            assert not executor.has_unfinished
    assert 0 < num_refused < 20


def test_what_is_checked_at_the_door() -> None:
    check = admission(100, 100).check
    with pytest.raises(RequestError, match="the prompt is empty"):
        check([], SamplingParams())
    with pytest.raises(RequestError, match="at most 63"):
        check([1] * 64, SamplingParams())
    assert len(check([1] * 64, SamplingParams(), RequestOptions(pooling="last"))) == 64
    with pytest.raises(RequestError, match=r"stop_token_ids must be integers in \[0, 97\)"):
        check([1], SamplingParams(stop_token_ids=[97]))
    with pytest.raises(RequestError, match="bad_words are text"):
        check([1], SamplingParams(bad_words=["a"]))


def test_a_request_that_was_refused_leaves_nothing_behind() -> None:
    executor = Executor(FakeModel(), ExecutorConfig(kv_cache_tokens=32, debug=True))
    with pytest.raises(RequestError):
        executor.add_request(NewRequest("r", [1] * 30, SamplingParams(max_tokens=20)))
    executor.add_request(NewRequest("r", [1], SamplingParams(temperature=0, max_tokens=2)))
    assert len(run_all(executor)["r"][0]) == 2


def test_an_embedding_is_one_sequence() -> None:
    executor = Executor(FakeModel())
    with pytest.raises(RequestError, match="one vector: n, best_of and beams must be left out"):
        executor.admission.check([1, 2], SamplingParams(n=2), RequestOptions(pooling="last"))
