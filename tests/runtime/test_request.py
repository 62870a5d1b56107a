from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inlay.errors import RequestError
from inlay.runtime.request import Request, check_prompt
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


def test_phases() -> None:
    request = make_request()
    assert (request.num_uncomputed_tokens, request.is_decoding) == (3, False)
    request.num_computed_tokens = 2
    assert (request.num_uncomputed_tokens, request.is_decoding) == (1, False)
    request.num_computed_tokens = 3
    request.append(4)
    assert (request.num_uncomputed_tokens, request.is_decoding) == (1, True)


def test_why_a_request_ends() -> None:
    request = make_request()
    assert request.append(4) == (None, None)
    assert request.append(4) == (None, None)
    assert request.append(4) == ("length", None)
    assert make_request().append(7) == ("stop", 7)
    assert make_request().append(9) == ("stop", None)
    assert make_request(max_total_tokens=4).append(7) == ("stop", 7)
