from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.errors import OptionError, RequestError
from inlay.runtime import scheduler as scheduler_module
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.ledger import Pending
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling import Sampled, SampledToken
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import (
    LIMITS,
    VOCAB_SIZE,
    FakeModel,
    assert_nothing_held,
    generate_alone,
    run_all,
)

EOS = 11
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def make_executor(eos: int | None = None, **options: int) -> tuple[FakeModel, Executor]:
    model = FakeModel(eos=eos)
    ends = () if eos is None else (eos,)
    config = ExecutorConfig(eos_token_ids=ends, debug=True, **options)  # type: ignore[arg-type]
    return model, Executor(model, config)


def add(executor: Executor, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
    executor.add_request(NewRequest(name, list(prompt), params))


def prompt_of(size: int, seed: int = 0) -> list[int]:
    return random.Random(f"{size} {seed}").choices(range(VOCAB_SIZE), k=size)


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and the one before which it is aborted."""

    prompt: tuple[int, ...]
    params: SamplingParams
    step: int
    abort_step: int | None


TOKEN = st.integers(0, VOCAB_SIZE - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 4]),
    top_p=st.sampled_from([1.0, 1.0, 0.6]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.one_of(st.integers(1, 20), st.none()),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(TOKEN, max_size=3),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    typical_p=st.sampled_from([1.0, 1.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.75, -0.5]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3]),
    logit_bias=st.dictionaries(TOKEN, st.sampled_from([-100.0, 2.0, 5.0]), max_size=2),
    allowed_token_ids=st.one_of(st.none(), st.none(), st.lists(TOKEN, min_size=1, max_size=30)),
    bad_words_ids=st.lists(st.lists(TOKEN, min_size=1, max_size=2), max_size=3),
    min_tokens=st.sampled_from([0, 0, 1]),
)
ARRIVALS = st.builds(
    Arrival,
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40).map(tuple),
    params=PARAMS,
    step=st.integers(0, 15),
    abort_step=st.one_of(st.none(), st.none(), st.integers(0, 40)),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=9),
    max_num_seqs=st.integers(1, 6),
    max_num_tokens=st.integers(6, 24),
    kv_cache_tokens=st.integers(64, 400),
    failing_steps=st.sets(st.integers(1, 30), max_size=1),
)
def test_any_schedule_gives_what_each_request_gives_alone(
    arrivals: list[Arrival],
    max_num_seqs: int,
    max_num_tokens: int,
    kv_cache_tokens: int,
    failing_steps: set[int],
) -> None:
    """Ragged, chunked, mixed, joining and leaving between steps, some aborted, some failing."""
    model, executor = make_executor(
        EOS,
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens,
        kv_cache_tokens=kv_cache_tokens,
    )

    def fail_sometimes(number: int) -> None:
        if number in failing_steps:
            raise RuntimeError("out of luck")

    model.before_forward = fail_sometimes
    outputs: list[StepOutput] = []
    aborted = set()
    for number in range(1000):
        for index, arrival in enumerate(arrivals):
            if arrival.abort_step == number and executor.abort(str(index)):
                aborted.add(index)
            if arrival.step == number:
                add(executor, str(index), arrival.prompt, arrival.params)
        outputs += executor.step()
        if number > 40 and not executor.has_unfinished:
            break
    assert_nothing_held(executor)
    unlucky = [o for o in outputs if o.error and not isinstance(o.error, RequestError)]
    assert failing_steps or not unlucky
    for index, arrival in enumerate(arrivals):
        mine = [output for output in outputs if output.request_id == str(index)]
        tokens = [token for output in mine for token in output.token_ids]
        alone, reason = generate_alone(model, arrival.prompt, arrival.params, LIMITS.max_seq_len)
        if index in aborted:
            assert tokens == alone[: len(tokens)]
            assert not any(output.finished for output in mine)
        elif mine[-1] in unlucky:
            assert tokens == alone[: len(tokens)]
        elif mine[-1].error is not None:
            assert (tokens, "error") == (alone, reason), "no token was left to choose"
        else:
            assert tokens == alone
            assert [output.finish_reason for output in mine] == [None] * (len(mine) - 1) + [reason]


def test_the_fake_model_notices_what_it_should() -> None:
    """A model that could not tell right from wrong would make the test above worthless."""
    prompt = prompt_of(20)
    for fault in ("slot", "table", "position", "token", "chunk"):
        model, executor = make_executor(max_num_tokens=8)
        honest = FakeModel.forward

        def forward(step, model=model, fault=fault, honest=honest):  # type: ignore[no-untyped-def]
            if len(model.steps) == 2:
                tables = step.block_tables.flip(-1) if fault == "table" else step.block_tables
                if fault == "slot":
                    step.slot_mapping[1, :2] = step.slot_mapping[1, [1, 0]]
                if fault == "position":
                    step.position_ids[0] += 1
                if fault == "token":
                    step.input_ids[3] += 1
                lens = step.seq_lens - 1 if fault == "chunk" else step.seq_lens
                step = replace(step, block_tables=tables, seq_lens=lens)
            return honest(model, step)

        model.forward = forward  # type: ignore[method-assign]
        add(executor, "a", prompt, replace(GREEDY, max_tokens=1))
        tokens, _ = run_all(executor)["a"]
        alone, _ = generate_alone(model, prompt, replace(GREEDY, max_tokens=1), 64)
        assert tokens != alone, f"a wrong {fault} goes unnoticed"


def test_prefill_and_decode_mix_in_one_step() -> None:
    model, executor = make_executor(max_num_tokens=10)
    add(executor, "short", prompt_of(3), GREEDY)
    add(executor, "long", prompt_of(25), GREEDY)
    run_all(executor)
    kinds = [(s.num_tokens, s.num_requests, s.num_logits) for s in model.steps[:4]]
    assert kinds == [(10, 2, 1), (10, 2, 1), (10, 2, 2), (2, 2, 2)]


def test_sizes_are_padded_up_the_ladder() -> None:
    model, executor = make_executor()
    for name in range(5):
        add(executor, str(name), prompt_of(3 + name), GREEDY)
    run_all(executor)
    first, last = model.steps[:2]
    assert (first.num_tokens, len(first.input_ids)) == (24, 24)
    assert (last.num_tokens, len(last.input_ids)) == (5, 8)
    assert (last.num_requests, len(last.seq_lens)) == (5, 6)
    assert (last.num_logits, len(last.logits_indices)) == (5, 6)
    model, executor = make_executor()
    add(executor, "alone", [1, 2, 3], replace(GREEDY, max_tokens=2))
    run_all(executor)
    sizes = [(len(s.input_ids), len(s.seq_lens), len(s.logits_indices)) for s in model.steps]
    assert sizes == [(4, 1, 2), (2, 1, 2)]


def test_with_overlap_decode_input_comes_from_the_device() -> None:
    """What the sampler wrote is run, not what the host believes was sampled."""
    model, executor = make_executor(overlap=True)
    add(executor, "a", prompt_of(5), GREEDY)
    add(executor, "b", prompt_of(6), GREEDY)
    assert executor.step() == []
    executor.sampling.last_tokens[executor._sequences["b"][0].slot] = 42
    executor.step()
    assert model.steps[1].input_ids[1] == 42


def test_unseeded_requests_differ_and_seeded_ones_repeat() -> None:
    _, executor = make_executor()
    params = SamplingParams(temperature=1.5, max_tokens=20)
    for name in "abc":
        add(executor, name, [1, 2, 3], params)
    for name in "def":
        add(executor, name, [1, 2, 3], replace(params, seed=5))
    results = run_all(executor)
    assert len({tuple(results[name][0]) for name in "abc"}) == 3
    assert len({tuple(results[name][0]) for name in "def"}) == 1


def test_end_of_sequence_stop_tokens_and_lengths() -> None:
    _, executor = make_executor()
    add(executor, "a", [5, 6, 7], GREEDY)
    free = run_all(executor)["a"][0]
    eos = free[4]
    _, executor = make_executor()
    executor = Executor(executor.model, ExecutorConfig(eos_token_ids=(eos,), debug=True))
    first = free.index(eos)
    add(executor, "eos", [5, 6, 7], GREEDY)
    add(executor, "ignored", [5, 6, 7], replace(GREEDY, ignore_eos=True))
    add(executor, "stop", [5, 6, 7], replace(GREEDY, stop_token_ids=[free[0], 3]))
    add(executor, "one", [5, 6, 7], replace(GREEDY, max_tokens=1, ignore_eos=True))
    add(executor, "full", [5] * 60, replace(GREEDY, max_tokens=None, ignore_eos=True))
    outputs = []
    while executor.has_unfinished:
        outputs += executor.step()
    last = {output.request_id: output for output in outputs}
    counts = {name: sum(o.request_id == name for o in outputs) for name in last}
    assert counts == {"eos": first + 1, "ignored": 8, "stop": 1, "one": 1, "full": 4}
    ends = {name: (o.finish_reason, o.stop_reason, o.token_ids[-1]) for name, o in last.items()}
    assert ends["eos"] == ("stop", None, eos)
    assert ends["stop"] == ("stop", free[0], free[0])
    assert [ends[name][0] for name in ("ignored", "one", "full")] == ["length"] * 3


def test_what_cannot_run_is_refused_and_nothing_is_queued() -> None:
    _, executor = make_executor(kv_cache_tokens=32)
    cases = {
        "the prompt is empty": ([], GREEDY),
        r"prompt has 64 tokens.*max_seq_len is 64.*at most 63": ([1] * 64, GREEDY),
        r"integers in \[0, 97\).*given 97 at position 1": ([1, 97], GREEDY),
        r"stop_token_ids must be.*given 97": ([1], replace(GREEDY, stop_token_ids=[97])),
        r"may grow to 33 tokens \(25 of prompt\), 9 blocks.*has 8 blocks \(32 tokens\)": (
            [1] * 25,
            GREEDY,
        ),
        r"may grow to 64 tokens \(1 of prompt\), 16 blocks": (
            [1],
            replace(GREEDY, max_tokens=None),
        ),
    }
    for message, (prompt, params) in cases.items():
        with pytest.raises(RequestError, match=message):
            add(executor, "a", prompt, params)
    assert not executor.has_unfinished
    add(executor, "a", [1] * 24, GREEDY)
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        add(executor, "a", [1], GREEDY)
    assert len(run_all(executor)["a"][0]) == 8
    add(executor, "a", [1], GREEDY)
    run_all(executor)
    assert_nothing_held(executor)


def test_options_beyond_the_model_are_refused() -> None:
    with pytest.raises(OptionError, match="max_num_seqs can be at most 6"):
        make_executor(max_num_seqs=7)


def test_abort_in_every_state() -> None:
    _, executor = make_executor(max_num_seqs=2, max_num_tokens=8)
    add(executor, "decoding", prompt_of(2), GREEDY)
    add(executor, "chunked", prompt_of(30), GREEDY)
    add(executor, "waiting", prompt_of(3), GREEDY)
    executor.step()
    executor.step()
    assert [executor.abort(name) for name in ("waiting", "chunked", "decoding")] == [True] * 3
    assert_nothing_held(executor)
    assert not executor.has_unfinished
    assert executor.step() == []
    assert not executor.abort("decoding")
    assert not executor.abort("never heard of")
    add(executor, "done", prompt_of(2), GREEDY)
    run_all(executor)
    assert not executor.abort("done")


def test_abort_from_inside_a_step() -> None:
    """A signal handler may do this: the step's result for that request is dropped."""
    model, executor = make_executor()
    add(executor, "a", prompt_of(4), GREEDY)
    add(executor, "b", prompt_of(5), GREEDY)
    model.before_forward = lambda number: executor.abort("a") and None if number == 3 else None
    results = run_all(executor)
    alone = [generate_alone(model, prompt_of(n), GREEDY, 64)[0] for n in (4, 5)]
    assert results == {"a": (alone[0][:2], None), "b": (alone[1], "length")}
    assert_nothing_held(executor)


@pytest.mark.parametrize("failing_step", [1, 2, 5])
def test_a_failing_step_ends_only_its_own_requests(failing_step: int) -> None:
    model, executor = make_executor(max_num_seqs=2)
    broken = RuntimeError("out of luck")

    def fail(number: int) -> None:
        if number == failing_step:
            raise broken

    model.before_forward = fail
    for name in range(4):
        add(executor, str(name), prompt_of(3 + name), GREEDY)
    outputs = []
    while executor.has_unfinished:
        outputs += executor.step()
    errors = {output.request_id: output.error for output in outputs if output.error}
    assert errors == {"0": broken, "1": broken}
    assert_nothing_held(executor)
    for name in ("2", "3"):
        tokens = [t for output in outputs if output.request_id == name for t in output.token_ids]
        assert tokens == generate_alone(model, prompt_of(3 + int(name)), GREEDY, 64)[0]


def test_a_failing_sampler_frees_everything_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, executor = make_executor()
    monkeypatch.setattr(executor.model, "forward", lambda step: torch.zeros(0, VOCAB_SIZE))
    add(executor, "a", prompt_of(4), GREEDY)
    (output,) = executor.step()
    assert isinstance(output.error, Exception)
    assert output.finished
    assert_nothing_held(executor)


def test_an_interrupt_is_raised_and_reported_to_the_others() -> None:
    model, executor = make_executor(max_num_seqs=2)

    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    model.before_forward = interrupt
    for name in "abc":
        add(executor, name, prompt_of(4), GREEDY)
    executor.step()
    with pytest.raises(KeyboardInterrupt):
        executor.step()
    executor.scheduler.check()
    assert executor.has_unfinished
    outputs = executor.step()
    assert [o.request_id for o in outputs if isinstance(o.error, KeyboardInterrupt)] == ["a", "b"]
    assert run_all(executor)["c"][1] == "length"
    assert_nothing_held(executor)


def test_an_interrupt_while_results_are_read_loses_no_answer() -> None:
    _, executor = make_executor(max_num_seqs=2)
    read = executor.sampling.read
    add(executor, "a", prompt_of(4), GREEDY)

    def interrupted(sampled: Sampled) -> list[SampledToken]:
        executor.sampling.read = read  # type: ignore[method-assign]
        raise KeyboardInterrupt

    executor.sampling.read = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        executor.step()
    assert executor.has_unfinished
    (output,) = executor.step()
    assert isinstance(output.error, KeyboardInterrupt)
    assert_nothing_held(executor)


def test_a_beam_search_warms_the_cache_with_its_prompt() -> None:
    model, executor = make_executor()
    prompt = prompt_of(20)
    beams = SamplingParams(temperature=0, use_beam_search=True, n=2, max_tokens=4)
    add(executor, "beams", prompt, beams)
    run_all(executor)
    add(executor, "after", prompt, GREEDY)
    outputs = []
    while executor.has_unfinished:
        outputs += executor.step()
    assert outputs[0].num_cached_tokens == 16
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == generate_alone(model, prompt, GREEDY, 64)[0]


def test_a_model_that_counts_positions_without_padding() -> None:
    model = FakeModel(replace(LIMITS, padding_token=7))
    executor = Executor(model)
    with pytest.raises(RequestError, match=r"must not hold the padding token 7.*leave it out"):
        add(executor, "r", [5, 7, 8], GREEDY)
    # Sampled, it ends the request: what comes behind it would have other positions.
    params = replace(GREEDY, temperature=2.0, max_tokens=50, ignore_eos=True)
    for seed in range(20):
        add(executor, str(seed), [5, 8], replace(params, seed=seed))
    results = run_all(executor).values()
    assert any(reason == "stop" for _, reason in results)
    for tokens, reason in results:
        assert (reason == "stop") == (tokens[-1] == 7)
        assert 7 not in tokens[:-1]


def test_a_failure_is_told_by_a_sequence_that_has_not_ended() -> None:
    model, executor = make_executor(EOS)
    params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=40)
    request = NewRequest("a", [1, 2, 3], params)
    pending = Pending()
    executor.add_request(request)
    pending.add(request)
    ended: list[StepOutput] = []
    while executor.has_unfinished:
        ended += [output for output in pending.settle(executor.step()) if output.finished]
        if ended:
            model.before_forward = fail
    assert [(output.index, output.finish_reason) for output in ended] == [(0, "stop"), (1, "error")]
    assert "a" not in pending


def fail(_: int) -> None:
    raise ValueError("out of luck")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=0, allowed_token_ids=[1, 2]),
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=0.9, min_p=0.1, top_p=0.9, seed=1),
    ],
)
def test_a_failed_step_ends_none_that_is_only_in_the_next(params: SamplingParams) -> None:
    model, executor = make_executor(overlap=True, max_num_tokens=8)
    model.before_forward = lambda number: fail(number) if number == 1 else None
    add(executor, "first", [1, 2, 3], params)
    executor.step()  # fails on the device, unread; the next is launched behind it
    add(executor, "second", [1, 2, 3, 4], GREEDY)
    (output,) = executor.step()
    assert (output.request_id, str(output.error)) == ("first", "out of luck")
    assert run_all(executor) == {"second": generate_alone(model, [1, 2, 3, 4], GREEDY, 64)}
    assert_nothing_held(executor)


def test_a_request_of_low_priority_is_not_preempted_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_module, "AGING_STEPS", 50)
    model = FakeModel(windows=(0,))
    config = ExecutorConfig(scheduler_policy="max_utilization", kv_cache_tokens=64, debug=True)
    executor = Executor(model, config)
    params = SamplingParams(temperature=0, max_tokens=20)
    executor.add_request(NewRequest("low", prompt_of(40), params, RequestOptions(priority=5)))
    tokens: list[int] = []
    for step in range(400):
        if step % 3 == 0:
            add(executor, str(step), prompt_of(8, step), replace(params, max_tokens=30))
        for output in executor.step():
            tokens += output.token_ids if output.request_id == "low" else ()
    assert executor.get_stats()["num_waiting"] > 10, "the others alone are too many"
    assert tokens == generate_alone(model, prompt_of(40), params, 64)[0]


def test_block_copies_are_counted() -> None:
    _, executor = make_executor()
    add(executor, "r", prompt_of(6), SamplingParams(n=3, seed=1, max_tokens=2))
    run_all(executor)
    assert executor.get_stats()["num_block_copies"] == 2 * 2, "of each group, for all but the last"
