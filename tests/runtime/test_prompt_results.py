"""Log probabilities of prompts and embeddings: whatever the chunks, preemptions and prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from inlay.errors import RequestError
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.outputs import StepOutput
from inlay.runtime.prompt_logprobs import PromptLogprobs
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling import SamplingStage
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import FakeModel, assert_nothing_held, logits_of, view

PROMPT = [(11 * i + i * i) % 97 for i in range(21)]
ONE = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)


def make_executor(**options: Any) -> Executor:
    return Executor(FakeModel(), ExecutorConfig(debug=True, **options))


def run(executor: Executor, preempt_before: int | None = None) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {}
    number = 0
    while executor.has_unfinished:
        if number == preempt_before and executor.scheduler.running:
            executor.scheduler.preempt(executor.scheduler.running[0])
        for output in executor.step():
            outputs.setdefault(output.request_id, []).append(output)
        number += 1
        assert number < 200
    return outputs


def expected(prompt: list[int]) -> list[torch.Tensor]:
    """Log probabilities behind each token but the last."""
    pairs = np.array(list(zip(prompt, range(len(prompt)), strict=True)), dtype=np.int64)
    rows = []
    for end in range(1, len(prompt)):
        seen = [view(pairs[:end], window) for window in FakeModel().windows]
        rows.append(torch.from_numpy(logits_of(seen, 97)).double().log_softmax(-1))
    return rows


def check_logprobs(outputs: list[StepOutput]) -> None:
    given = [place for output in outputs for place in output.prompt_logprobs]
    assert given[0] is None
    assert len(given) == len(PROMPT), "each once"
    for token, row, places in zip(PROMPT[1:], expected(PROMPT), given[1:], strict=True):
        assert places is not None
        best = row.topk(2).indices.tolist()
        assert set(places) == {token, *best}
        for one, place in places.items():
            # float32 logits, summed in float64 on both sides.
            assert place.logprob == pytest.approx(float(row[one]), abs=1e-9)
            assert place.rank == 1 + int((row > row[one]).sum())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_num_tokens", [6, 7, 24])
def test_prompt_logprobs_over_chunks(max_num_tokens: int, overlap: bool) -> None:
    executor = make_executor(max_num_tokens=max_num_tokens, overlap=overlap)
    executor.add_request(NewRequest("plain", PROMPT, SamplingParams(temperature=0, max_tokens=3)))
    plain = run(executor)["plain"]
    executor.add_request(NewRequest("r", PROMPT, ONE))
    outputs = run(executor)["r"]
    check_logprobs(outputs)
    tokens = [[t for output in each for t in output.token_ids] for each in (plain, outputs)]
    assert tokens[0] == tokens[1]
    assert all(output.prompt_logprobs == () for output in plain)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step", range(7))
def test_prompt_logprobs_are_given_once_though_the_prompt_runs_twice(
    step: int, overlap: bool
) -> None:
    """Also those of a chunk that was under way when the request lost its place."""
    executor = make_executor(max_num_tokens=6, overlap=overlap)
    executor.add_request(NewRequest("r", PROMPT, ONE))
    check_logprobs(run(executor, preempt_before=step)["r"])
    assert_nothing_held(executor)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("preempt_before", [None, 1, 2, 3])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("max_num_tokens", [6, 24])
def test_embeddings_over_chunks(
    pooling: Any, max_num_tokens: int, preempt_before: int | None, overlap: bool
) -> None:
    """The fake model's hidden states are (token, position). With and without a cached prefix."""
    executor = make_executor(max_num_tokens=max_num_tokens, overlap=overlap)
    states = torch.tensor([*zip(PROMPT, range(len(PROMPT)), strict=True)]).float()
    want = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
    for round_ in range(2):
        options = RequestOptions(pooling=pooling, normalize=bool(round_))
        executor.add_request(NewRequest("r", PROMPT, SamplingParams(), options))
        (output,) = run(executor, preempt_before)["r"]
        assert (output.finish_reason, output.token_ids) == ("stop", ())
        length = torch.linalg.vector_norm(want).clamp_min(1e-12) if round_ else 1
        # Means of 21 small integers in float32, summed in pieces.
        torch.testing.assert_close(torch.tensor(output.embedding), want / length)
    assert_nothing_held(executor)


def test_an_embedding_among_generations() -> None:
    executor = make_executor(max_num_tokens=8, max_num_seqs=3)
    alone = make_executor()
    params = SamplingParams(temperature=0, max_tokens=6)
    alone.add_request(NewRequest("g", PROMPT, params))
    executor.add_request(NewRequest("g", PROMPT, params))
    options = RequestOptions(pooling="mean", normalize=False)
    executor.add_request(NewRequest("e", PROMPT[:7], SamplingParams(), options))
    outputs = run(executor)
    assert len(outputs["e"]) == 1
    tokens = [[t for o in each["g"] for t in o.token_ids] for each in (run(alone), outputs)]
    assert tokens[0] == tokens[1]


def test_encoders_come_whole_and_have_no_logits() -> None:
    model = FakeModel()
    model.is_encoder = True
    executor = Executor(model, ExecutorConfig(debug=True, max_num_tokens=8, max_num_seqs=3))
    options = RequestOptions(pooling="mean", normalize=False)
    with pytest.raises(RequestError, match=r"this model is an encoder.*generates nothing"):
        executor.add_request(NewRequest("r", PROMPT[:4], SamplingParams()))
    with pytest.raises(RequestError, match="prompt has 9 tokens; an encoder's prompts are run"):
        executor.add_request(NewRequest("r", PROMPT[:9], SamplingParams(), options))
    every = SamplingParams(prompt_logprobs=0)
    with pytest.raises(RequestError, match="prompt_logprobs must be None; given 0"):
        executor.add_request(NewRequest("r", PROMPT[:4], every, options))
    for name, size in (("a", 5), ("b", 4), ("c", 4)):
        executor.add_request(NewRequest(name, PROMPT[:size], SamplingParams(), options))
    outputs = run(executor)
    assert [step.num_tokens for step in model.steps] == [5, 8]
    assert {name: len(each) for name, each in outputs.items()} == {"a": 1, "b": 1, "c": 1}


def test_what_is_read_was_begun_before_that_which_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def noting(where: type, name: str) -> None:
        original = getattr(where, name)

        def noted(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(where, name, noted)

    noting(PromptLogprobs, "run")
    noting(SamplingStage, "_send")  # on CUDA it ends with the event that `read` waits for
    executor = make_executor(max_num_tokens=8)
    executor.add_request(NewRequest("r", PROMPT, ONE))
    run(executor)
    # Of three chunks the first two sample nothing.
    assert calls == ["run", "_send"] * (3 + 2)
