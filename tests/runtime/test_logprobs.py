from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from inlay.errors import RequestError
from inlay.runtime.executor import Executor
from inlay.runtime.logprobs import top_logprobs
from inlay.runtime.output_processor import OutputProcessor
from inlay.runtime.outputs import Logprob, StepOutput
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel
from tests.runtime.toy_tokenizers import byte_level

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def test_numbers_and_ranks() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 5.0, 1.0]])
    first, second = top_logprobs(logits, [3, 2], [2, 0])
    expected = logits.double().log_softmax(-1)
    assert list(first) == [1, 2, 3]
    assert [first[token].rank for token in first] == [1, 1, 4]
    assert list(second) == [2]
    for row, places in enumerate((first, second)):
        for token, place in places.items():
            assert place.logprob == pytest.approx(float(expected[row, token]), rel=1e-12)


def test_more_than_the_vocabulary_has() -> None:
    (places,) = top_logprobs(torch.zeros(1, 3), [1], [3])
    assert set(places) == {0, 1, 2}
    (places,) = top_logprobs(torch.zeros(1, 3), [1], [20])
    assert set(places) == {0, 1, 2}


def test_requests_get_what_they_asked_for() -> None:
    """Of the model's own logits: what the request's bans and biases made of them does not show."""
    executor = Executor(FakeModel())
    executor.add_request(NewRequest("none", [1, 2], GREEDY))
    executor.add_request(NewRequest("own", [1, 2], replace(GREEDY, logprobs=0)))
    executor.add_request(NewRequest("some", [3], replace(GREEDY, logprobs=3)))
    executor.add_request(
        NewRequest("biased", [1, 2], replace(GREEDY, logprobs=2, logit_bias={5: 1000.0}))
    )
    outputs: dict[str, list[StepOutput]] = {}
    while executor.has_unfinished:
        for output in executor.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert all(output.logprobs == () for output in outputs["none"])
    for name, count in (("own", 1), ("some", 3), ("biased", 3)):
        for output in outputs[name]:
            (places,) = output.logprobs
            assert len(places) == count
            assert output.token_ids[0] in places
            assert all(-math.inf < place.logprob < 0 for place in places.values())
    assert all(output.logprobs[0][output.token_ids[0]].rank == 1 for output in outputs["some"])
    assert outputs["biased"][0].token_ids == (5,)
    assert outputs["biased"][0].logprobs[0][5].rank > 2
    assert outputs["own"][0].logprobs[0].keys() == {outputs["none"][0].token_ids[0]}


def test_outputs_hold_them_with_their_text() -> None:
    tokenizer = byte_level()
    (token,) = tokenizer.encode("a", add_special_tokens=False)
    processor = OutputProcessor(tokenizer)
    state = processor.add("r", "b", [token], SamplingParams(logprobs=1))
    for logprob in (-0.5, -0.25):
        places = {token: Logprob(logprob, 1)}
        processor.process([StepOutput("r", (token,), logprobs=(places,))])
    completion = state.snapshot().outputs[0]
    assert completion.logprobs == [{token: Logprob(p, 1, "a")} for p in (-0.5, -0.25)]
    assert completion.cumulative_logprob == -0.75
    silent = processor.add("s", "b", [token], SamplingParams()).snapshot().outputs[0]
    assert (silent.logprobs, silent.cumulative_logprob) == (None, None)


@pytest.mark.parametrize("value", [-1, 21, 1.5, True])
def test_values_that_are_not_allowed(value: object) -> None:
    with pytest.raises(RequestError, match="logprobs must be None or an integer from 0 to 20"):
        SamplingParams(logprobs=value)  # type: ignore[arg-type]
