from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inlay.errors import RequestError
from inlay.runtime.block_pool import block_names
from inlay.runtime.request import (
    UNKNOWN_TOKEN,
    NewRequest,
    Request,
    RequestOptions,
    check_prompt,
    make_sequences,
)
from inlay.runtime.sampling_params import SamplingParams


def make_request(**overrides: Any) -> Request:
    fields: dict[str, Any] = {
        "request_id": "r",
        "token_ids": [1, 2, 3],
        "params": SamplingParams(),
        "seed": 0,
        "stop_token_ids": frozenset({7}),
        "eos_token_ids": frozenset({9}),
        "max_total_tokens": 6,
    }
    return Request(**{**fields, **overrides})


def test_prompts_are_checked() -> None:
    assert check_prompt((np.int64(1), 0, 9), 10, 4) == [1, 0, 9]
    with pytest.raises(RequestError, match="the prompt is empty"):
        check_prompt([], 10, 8)
    with pytest.raises(RequestError, match=r"prompt has 8 tokens.*max_seq_len is 8.*at most 7"):
        check_prompt([1] * 8, 10, 8)


@pytest.mark.parametrize("bad", [10, -1, 2**70, 1.0, "a", None, True, [1]])
def test_what_is_no_token_of_the_vocabulary_is_named(bad: Any) -> None:
    with pytest.raises(RequestError, match=r"integers in \[0, 10\).* at position 2") as caught:
        check_prompt([1, 2, bad, 4], 10, 8)
    assert f"given {bad!r}" in str(caught.value)


def await_token(request: Request) -> None:
    """As when a step is launched that samples a token for it."""
    request.num_computed_tokens = len(request.token_ids)
    request.token_ids.append(UNKNOWN_TOKEN)
    request.num_pending += 1


def accept(request: Request, token: int) -> tuple[str | None, int | None]:
    await_token(request)
    return request.accept(token)


def test_phases() -> None:
    request = make_request()
    assert (request.num_uncomputed_tokens, request.is_decoding) == (3, False)
    request.num_computed_tokens = 2
    assert (request.num_uncomputed_tokens, request.is_decoding) == (1, False)
    await_token(request)
    assert (request.num_uncomputed_tokens, request.is_decoding) == (1, True)
    assert (request.num_known_tokens, len(request.token_ids)) == (3, 4)
    request.accept(4)
    assert (request.num_known_tokens, request.token_ids) == (4, [1, 2, 3, 4])


def test_why_a_request_ends() -> None:
    request = make_request()
    assert accept(request, 4) == (None, None)
    assert accept(request, 4) == (None, None)
    assert accept(request, 4) == ("length", None)
    assert accept(make_request(), 7) == ("stop", 7)
    assert accept(make_request(), 9) == ("stop", None)
    assert accept(make_request(max_total_tokens=4), 7) == ("stop", 7)


def test_tokens_behind_the_end_are_dropped() -> None:
    request = make_request()
    await_token(request)
    await_token(request)
    assert request.accept(9) == ("stop", None)
    assert (request.token_ids, request.num_pending) == ([1, 2, 3, 9], 0)
    with pytest.raises(AssertionError, match="no token is awaited"):
        request.accept(4)


def test_pending_tokens_are_taken_in_order() -> None:
    request = make_request()
    await_token(request)
    await_token(request)
    request.accept(4)
    assert request.token_ids == [1, 2, 3, 4, UNKNOWN_TOKEN]
    request.accept(5)
    assert request.token_ids == [1, 2, 3, 4, 5]


def test_what_can_run() -> None:
    request = make_request()
    await_token(request)
    assert request.can_run, "its token is on the device"
    history = make_request(params=SamplingParams(no_repeat_ngram_size=2))
    await_token(history)
    assert not history.can_run, "its next token depends on this one"
    await_token(request)
    await_token(request)
    assert not request.can_run, "it may grow to 6 tokens"
    embedding = make_request(options=RequestOptions(pooling="last"), max_total_tokens=3)
    assert embedding.can_run
    embedding.num_computed_tokens = 3
    assert not embedding.can_run


def test_blocks_are_named_by_known_tokens_alone() -> None:
    request = make_request(token_ids=list(range(7)), max_total_tokens=20)
    await_token(request)
    (first,) = request.name_blocks(4)
    request.accept(7)
    assert request.name_blocks(4) == block_names([], range(8), 4, None)
    assert request.block_names[0] == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 1.5}, "priority must be an integer; given 1.5"),
        ({"timeout": 0}, "timeout must be None or seconds > 0; given 0"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"cache_salt": 3}, "cache_salt must be None or a string"),
        ({"cache_salt": "a\ud800"}, r"string that UTF-8 can encode, not empty; given 'a\\ud800'"),
        ({"cache_salt": ""}, r"not empty; given ''"),
        ({"cache_priority": 101}, "cache_priority must be an integer from 0 to 100"),
        ({"pooling": "max"}, "pooling must be None,"),
        ({"normalize": 1}, "normalize must be a bool"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RequestOptions(**options)


def test_a_family_has_seeds_of_its_own_and_one_order() -> None:
    new = NewRequest("r", [1, 2], SamplingParams(n=2, best_of=3))
    family = make_sequences(
        new,
        [1, 2],
        order=5,
        seed=2**64 - 1,
        eos_token_ids=[9],
        padding_token=7,
        max_total_tokens=9,
    )
    assert [one.seed for one in family] == [2**64 - 1, 0, 1]
    assert [one.state.name for one in family] == ["WAITING", "UNFORKED", "UNFORKED"]
    assert family[0].siblings == family[1:]
    assert {(one.order, one.stop_token_ids) for one in family} == {(5, frozenset({7}))}
