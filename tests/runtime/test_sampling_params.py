from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from inlay.errors import RequestError
from inlay.runtime.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k) == (1.0, 1.0, 0)
    assert (params.max_tokens, params.seed, params.ignore_eos) == (16, None, False)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (True, False)
    assert params.stop_strings == ()
    assert params.stop_token_ids == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("max_tokens", 2**63),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("stop_token_ids", [True]),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "no"),
    ],
)
def test_bad_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"SamplingParams\.{name} must be .*given") as caught:
        SamplingParams(**{name: value})
    assert repr(value) in str(caught.value)


def test_unknown_names_and_positions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"no parameter 'temprature': it has .*temperature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="'guided_decoding': guided decoding is not built yet"):
        SamplingParams(guided_decoding=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


def test_lists_are_copied_and_the_whole_is_frozen() -> None:
    stop, ids = ["a", "b"], [1, 2]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.append("c")
    ids.append(3)
    assert params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_accepted_forms() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy
    numbers = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(5), seed=2**64 - 1)
    assert numbers.top_k == 5
    assert SamplingParams(max_tokens=None, top_k=-1).max_tokens is None


BEAMS = {"use_beam_search": True, "best_of": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be an integer from 1 to 64"),
        ({"n": 65}, "n must be an integer from 1 to 64"),
        ({"n": 3, "best_of": 2}, r"best_of must be None or at least n \(3\); given 2"),
        ({"n": 2, "temperature": 0}, "temperature must be at least 1e-05 where n or best_of > 1"),
        ({"best_of": 2, "temperature": 0}, "greedy sequences are equal"),
        ({"length_penalty": 2.0}, "length_penalty must be 1.0 unless use_beam_search=True"),
        ({"early_stopping": True}, "early_stopping must be False unless use_beam_search=True"),
        ({**BEAMS, "early_stopping": "soon"}, 'early_stopping must be True, False or "never"'),
        ({**BEAMS, "early_stopping": 1}, 'early_stopping must be True, False or "never"'),
        ({**BEAMS, "length_penalty": math.nan}, "length_penalty must be a number in"),
        ({**BEAMS, "temperature": 0.5}, "temperature must be 1 or 0 with use_beam_search=True"),
        ({**BEAMS, "top_k": 5}, "top_k must be 0 or -1 with use_beam_search=True; given 5"),
        ({**BEAMS, "top_p": 0.9}, "top_p must be 1 with use_beam_search=True"),
        ({**BEAMS, "logprobs": 0}, "logprobs must be None with use_beam_search=True"),
        ({**BEAMS, "stop": "x"}, r"stop must be \(\) with use_beam_search=True; given \('x',\)"),
        ({"use_beam_search": True}, "best_of must be 2 or more"),
        ({"use_beam_search": 1, "n": 2}, "use_beam_search must be a bool"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be None or an integer from 0 to 20"),
    ],
)
def test_several_sequences_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_how_many_sequences() -> None:
    assert SamplingParams().num_sequences == 1
    assert SamplingParams(n=3).num_sequences == 3
    assert SamplingParams(n=3, best_of=5).num_sequences == 5
    assert SamplingParams(n=3, best_of=5).needs_cumulative_logprob
    assert not SamplingParams(n=3).needs_cumulative_logprob
    beams = SamplingParams(use_beam_search=True, n=2, best_of=4, early_stopping="never")
    assert (beams.num_sequences, beams.needs_cumulative_logprob) == (4, False)
    assert SamplingParams(use_beam_search=True, n=2, temperature=0, top_k=-1).num_sequences == 2
