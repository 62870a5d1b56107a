"""Users' logits processors: called as promised, and nobody else's trouble when they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from inlay.errors import OptionError, RequestError
from inlay.runtime.processors import check_processors
from inlay.runtime.request import Request
from inlay.runtime.sampler import NO_TOKEN
from inlay.runtime.sampling import SampledToken, SamplingStage
from inlay.runtime.sampling_params import SamplingParams

CPU, VOCAB_SIZE, HERE = torch.device("cpu"), 50, __name__


class Force:
    """Nothing but one token, and the number of the call in `calls`."""

    def __init__(self, token: int = 3) -> None:
        self.token, self.calls = token, 0

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert prompt == [1, 2]
        assert len(output) == self.calls
        self.calls += 1
        forced = torch.full_like(logits, -torch.inf)
        forced[self.token] = 0.0
        return forced


class Spoiled:
    """Fails in the way that it is told."""

    def __init__(self, how: str) -> None:
        self.how = how
        if how == "init":
            raise ValueError("no such thing")
        if how == "exit in init":
            sys.exit(4)

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> Any:
        prompt.clear()
        match self.how:
            case "raise":
                raise ZeroDivisionError("by zero")
            case "exit":
                sys.exit(3)
            case "sparse":
                return logits.to_sparse()
            case "none":
                return None
            case "shape":
                return logits[:-1]
            case "dtype":
                return logits.long()
            case "nan":
                logits[4] = torch.nan
            case "inf":
                logits[4] = torch.inf
            case "empty":
                logits.fill_(-torch.inf)
        return logits


class Shift:
    """A batched one: forces token row-independent `token` for requests named so."""

    def __init__(self, vocab_size: int, device: torch.device, token: int, how: str = "") -> None:
        assert (vocab_size, device) == (VOCAB_SIZE, CPU)
        self.token, self.how = token, how

    def apply(self, logits: torch.Tensor, rows: Sequence[Request]) -> torch.Tensor:
        assert logits.shape == (len(rows), VOCAB_SIZE)
        if self.how == "raise":
            raise ZeroDivisionError("by zero")
        for row, request in enumerate(rows):
            if request.request_id == "forced":
                logits[row] = torch.nan if self.how == "nan" else logits[row] - 1e4
                logits[row, self.token] = 0.0
        return logits[:, :-1] if self.how == "shape" else logits


def make_requests(*params: SamplingParams, names: Sequence[str] = ()) -> list[Request]:
    return [
        Request(names[i] if names else "r", [1, 2], p, 3, frozenset(), frozenset(), 99, slot=i)
        for i, p in enumerate(params)
    ]


def run(stage: SamplingStage, requests: list[Request], steps: int = 1) -> list[SampledToken]:
    """The last step's tokens."""
    tokens: list[SampledToken] = []
    for step in range(steps):
        logits = torch.randn(len(requests), VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
        plan = stage.plan([(r, i) for i, r in enumerate(requests)], requests if not step else [])
        tokens = stage.read(stage.launch(plan, logits))
        for request, token in zip(requests, tokens, strict=True):
            request.token_ids.append(token.token_id)
    return tokens


def ban_token_0(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[0] = -torch.inf
    return logits


@pytest.mark.parametrize(
    ("entry", "token"),
    [
        (f"{HERE}:Force", 3),
        (f'{HERE}:Force:{{"token": 5}}', 5),
        ({"class": f"{HERE}:Force"}, 3),
        ({"class": f"{HERE}:Force", "args": {"token": 7}}, 7),
        (Force(9), 9),
    ],
)
def test_all_forms(entry: Any, token: int) -> None:
    mine, plain = SamplingParams(logits_processors=[entry]), SamplingParams()
    check_processors(mine, in_process=True)
    requests = make_requests(plain, mine, plain)
    found = run(SamplingStage(3, VOCAB_SIZE, CPU), requests, steps=4)
    expected = run(SamplingStage(3, VOCAB_SIZE, CPU), make_requests(plain, plain, plain), steps=4)
    assert found[1] == SampledToken(token)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert requests[1].token_ids[2:] == [token] * 4
    assert hash(mine) is not None


def test_each_sequence_has_its_own_also_after_a_preemption() -> None:
    """Force asserts that it was called once for each token of its sequence."""
    params = SamplingParams(logits_processors=[f"{HERE}:Force"])
    stage, requests = SamplingStage(3, VOCAB_SIZE, CPU), make_requests(params, params)
    assert run(stage, requests, 2) == [SampledToken(3)] * 2
    requests[0].slot = 2
    plan = stage.plan([(requests[0], 0)], [requests[0]])
    assert stage.read(stage.launch(plan, torch.zeros(1, VOCAB_SIZE))) == [SampledToken(3)]


def test_they_come_after_bans_and_one_after_the_other() -> None:
    params = SamplingParams(
        temperature=0,
        bad_words_ids=[[3]],
        logits_processors=[
            lambda p, o, logits: logits.nan_to_num(neginf=99),
            lambda p, o, logits: torch.where(logits == 99, -99, 0 * logits),
            ban_token_0,
        ],
    )
    (token,) = run(SamplingStage(1, VOCAB_SIZE, CPU), make_requests(params))
    assert token == SampledToken(1), "3 was banned, then found, the rest made equal, and 0 banned"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("init", "could not be made, ValueError: no such thing"),
        ("exit in init", "could not be made, SystemExit: 4"),
        ("raise", "raised ZeroDivisionError: by zero"),
        ("exit", "raised SystemExit: 3"),
        ("sparse", r"returned \[50\] torch.float32 torch.sparse_coo on cpu; must be"),
        ("none", "returned NoneType, not a tensor"),
        ("shape", r"returned \[49\] torch.float32 .* on cpu; must be \[50\]"),
        ("dtype", r"returned \[50\] torch.int64 .* on cpu; must be"),
        ("nan", "gave logits that are NaN"),
        ("inf", r"gave logits that are NaN, \+inf"),
        ("empty", "-inf all of them"),
    ],
)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_bad_one_fails_its_own_request_alone(how: str, message: str, temperature: float) -> None:
    plain = SamplingParams(temperature=temperature)
    entry = f'{HERE}:Spoiled:{{"how": "{how}"}}'
    bad = SamplingParams(temperature=temperature, logits_processors=[f"{HERE}:Force", entry])
    requests = make_requests(plain, bad, plain)
    found = run(SamplingStage(3, VOCAB_SIZE, CPU), requests)
    expected = run(SamplingStage(3, VOCAB_SIZE, CPU), make_requests(plain, plain, plain))
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert found[1].token_id == NO_TOKEN
    assert requests[1].token_ids[:2] == [1, 2], "a processor changed the prompt"
    with pytest.raises(RequestError, match=message) as caught:
        raise found[1].error or AssertionError("no error")
    assert entry in str(caught.value)


def test_a_models_nan_is_not_blamed_on_a_processor() -> None:
    params = SamplingParams(logits_processors=[f'{HERE}:Spoiled:{{"how": "nothing"}}'])
    stage, (request,) = SamplingStage(1, VOCAB_SIZE, CPU), make_requests(params)
    plan = stage.plan([(request, 0)], [request])
    logits = torch.full((1, VOCAB_SIZE), torch.nan)
    assert stage.read(stage.launch(plan, logits)) == [SampledToken(NO_TOKEN)]


def test_batched_ones() -> None:
    stage = SamplingStage(3, VOCAB_SIZE, CPU, [f'{HERE}:Shift:{{"token": 11}}'])
    assert stage.needs_history
    plain, names = SamplingParams(), ("a", "forced", "c")
    found = run(stage, make_requests(plain, plain, plain, names=names), 2)
    assert found[1] == SampledToken(11)
    expected = run(SamplingStage(3, VOCAB_SIZE, CPU), make_requests(plain, plain, plain), 2)
    assert [found[0], found[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize(
    ("how", "failed"), [("raise", {0, 1, 2}), ("shape", {0, 1, 2}), ("nan", {1})]
)
def test_a_bad_batched_one_is_named(how: str, failed: set[int]) -> None:
    entry = f'{HERE}:Shift:{{"token": 11, "how": "{how}"}}'
    stage, plain = SamplingStage(3, VOCAB_SIZE, CPU, [entry]), SamplingParams()
    found = run(stage, make_requests(plain, plain, plain, names=("a", "forced", "c")))
    assert {row for row, token in enumerate(found) if token.error} == failed
    for row in failed:
        assert entry in str(found[row].error)
        assert found[row].token_id == NO_TOKEN


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("no.such.module:Class", "ModuleNotFoundError"),
        (f"{HERE}:Missing", "AttributeError"),
        (f"{HERE}:Force:{{1}}", "JSONDecodeError"),
        (f"{HERE}:VOCAB_SIZE", "is not a class"),
    ],
)
def test_what_cannot_be_found_is_refused_at_the_door(entry: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_processors(SamplingParams(logits_processors=[entry]), in_process=False)
    with pytest.raises(OptionError, match="processors: "):
        SamplingStage(1, VOCAB_SIZE, CPU, [entry])


def test_callables_stay_in_their_process() -> None:
    params = SamplingParams(logits_processors=[ban_token_0])
    check_processors(params, in_process=True)
    with pytest.raises(RequestError, match="in_process=True"):
        check_processors(params, in_process=False)


@pytest.mark.parametrize(
    "given",
    [
        "a:B",
        ["no colon"],
        [3],
        [{"class": 3}],
        [{"class": "a:B", "arguments": {}}],
        [{"class": "a:B", "args": []}],
        [{"class": "a:B", "args": {"x": Callable}}],
    ],
)
def test_forms_that_are_not_allowed(given: Any) -> None:
    with pytest.raises(RequestError, match=r"SamplingParams\.logits_processors must be a list of"):
        SamplingParams(logits_processors=given)
