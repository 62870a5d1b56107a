from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from inlay.backends.step import PADDING_SLOT, FlatRequests, StepInputs, StepRequest, build_step
from inlay.runtime import sampler as sampler_module
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.dispatch import Dispatcher
from inlay.runtime.draws import draw_row
from inlay.runtime.executor import Executor
from inlay.runtime.noise import row_keys
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling import SamplingStage
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import LIMITS, FakeModel, run_all

WIDTH = 16


def make(max_num_seqs: int = 6) -> tuple[FakeModel, Dispatcher]:
    model = FakeModel()
    model.allocate_kv_cache(20)
    dispatcher = Dispatcher(model, replace(LIMITS, max_num_seqs=max_num_seqs))
    assert dispatcher.capture() == 0, "on a CPU no memory is taken"
    model.steps.clear()
    return model, dispatcher


def build(requests: list[StepRequest], num_tokens: int | None = None) -> StepInputs:
    size = LIMITS.block_size
    return build_step(FlatRequests.of(requests, size), size, num_tokens=num_tokens)


def request(token: int, start: int, block: int) -> StepRequest:
    count = start // LIMITS.block_size + 1
    return StepRequest([token], start, [[block + i for i in range(count)]] * 2)


@pytest.mark.parametrize(("count", "size"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_decodes_are_padded_up_the_ladder(count: int, size: int) -> None:
    model, dispatcher = make()
    step = build([request(7 + i, i, 3 * i) for i in range(count)])
    before = [tensor.clone() for group in range(2) for tensor in model.kv_tensors(group)]
    logits = dispatcher.forward(step)
    (run,) = model.steps
    assert run.input_ids.tolist() == [7 + i for i in range(count)] + [0] * (size - count)
    assert run.position_ids.tolist() == [*range(count)] + [0] * (size - count)
    assert run.seq_lens.tolist() == [i + 1 for i in range(count)] + [0] * (size - count)
    assert run.query_start_loc.tolist() == [*range(count + 1)] + [count] * (size - count)
    assert run.slot_mapping[:, :count].tolist() == step.slot_mapping[:, :count].tolist()
    assert (run.slot_mapping[:, count:] == PADDING_SLOT).all()
    assert run.block_tables.shape == (2, size, WIDTH)
    assert len(logits) == size
    after = [tensor for group in range(2) for tensor in model.kv_tensors(group)]
    for old, new in zip(before, after, strict=True):
        assert int((old != new).any(-1).sum()) == count, "a slot for each token, no other"
    assert dispatcher.num_replayed == 1


def test_what_a_step_before_left_behind_is_not_read() -> None:
    """Its tables were wider, and it had more requests."""
    model, dispatcher = make()
    dispatcher.forward(build([request(7, 30, 5), request(8, 31, 9), request(9, 9, 0)]))
    graph = dispatcher._graphs[4]
    assert (graph.inputs[3][:, :3] != 0).any()
    step = build([request(1, 2, 3), request(2, 5, 4), request(3, 0, 1)])
    replayed = dispatcher.forward(step)
    plain = FakeModel()
    plain.allocate_kv_cache(20)
    for own, other in zip(plain._caches, model._caches, strict=True):
        own[:] = other
    torch.testing.assert_close(replayed[:3], plain.forward(step)[:3], rtol=0, atol=0)
    run = model.steps[-1]
    assert run.block_tables[0, 0].tolist()[0] == 3
    assert run.seq_lens.tolist() == [3, 6, 1, 0]


@pytest.mark.parametrize(
    "requests",
    [
        [StepRequest([1, 2, 3], 0, [[0]] * 2)],
        [StepRequest([1], 0, [[0]] * 2), StepRequest([2, 3], 0, [[1]] * 2)],
        [StepRequest([1], 0, [[0]] * 2), StepRequest([2], 0, [[1]] * 2, needs_logits=False)],
    ],
)
def test_mixed_steps_run_in_pieces_where_their_size_was_captured(
    requests: list[StepRequest],
) -> None:
    model, dispatcher = make()
    step = build(requests)
    padded = build(requests, num_tokens=4)
    for one in (step, padded):
        dispatcher.forward(one)
    assert model.steps == [step, padded]
    assert dispatcher.num_replayed == 0
    sizes = len(step.input_ids), len(padded.input_ids)
    assert dispatcher.num_in_pieces == sum(size in (2, 4, 8, 16, 24) for size in sizes)


def test_without_graphs_steps_run_as_they_are() -> None:
    model, dispatcher = make()
    dispatcher.drop()
    step = build([request(7, 0, 0)])
    dispatcher.forward(step)
    assert model.steps == [step]


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_are_the_same_with_and_without(overlap: bool) -> None:
    def tokens(**options: Any) -> tuple[Executor, dict[str, tuple[list[int], str | None]]]:
        executor = Executor(FakeModel(), ExecutorConfig(debug=True, overlap=overlap, **options))
        for number in range(9):
            params = SamplingParams(temperature=0.9, seed=number, max_tokens=3 + 3 * number)
            prompt = [(7 * number + i) % 97 for i in range(1 + 3 * number)]
            executor.add_request(NewRequest(f"{number}", prompt, params))
        return executor, run_all(executor)

    plain, expected = tokens(cuda_graphs=False)
    replayed, found = tokens(cuda_graphs=True)
    assert found == expected
    assert plain.get_stats()["num_graph_steps"] == 0
    assert replayed.get_stats()["num_graph_steps"] > 5


def draw_all(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    integers: torch.Tensor,
    floats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel for all rows does."""
    tokens, peaks = logits.argmax(-1), logits.amax(-1).float()
    seeds, top_k, is_greedy = integers[:, slots]
    keys = row_keys(seeds, positions).tolist()
    for row, values in enumerate(zip(*floats[:, slots].tolist(), top_k.tolist(), strict=True)):
        if not is_greedy[row]:
            tokens[row], _ = draw_row(logits[row].float().numpy(), keys[row], *values)
    return tokens, peaks


SAMPLED = [
    SamplingParams(temperature=0, max_tokens=9),
    SamplingParams(temperature=0.9, seed=1, max_tokens=14),
    SamplingParams(temperature=1.1, top_k=5, seed=2, max_tokens=11),
    SamplingParams(temperature=0.8, top_p=0.7, seed=3, max_tokens=17, logprobs=2),
]
EDITED = [
    SamplingParams(temperature=0, max_tokens=4, repetition_penalty=1.3),
    SamplingParams(temperature=0.7, seed=5, max_tokens=5, typical_p=0.9),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("one_token", [False, True])
def test_graphs_that_sample_give_the_same_tokens(
    overlap: bool, one_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside requests whose logits are edited first, and for prompts of one token, whose
    slots are new when they decode."""
    monkeypatch.setattr(sampler_module, "_find_op", lambda device: draw_all)
    given: list[int] = []
    launch = SamplingStage.launch

    def spy(self: SamplingStage, plan: Any, logits: Any, tokens: Any = None) -> Any:
        given.append(-1 if tokens is None else len(plan.requests))
        return launch(self, plan, logits, tokens)

    monkeypatch.setattr(SamplingStage, "launch", spy)

    def run(cuda_graphs: bool) -> dict[str, tuple[list[int], str | None]]:
        given.clear()
        config = ExecutorConfig(debug=True, overlap=overlap, cuda_graphs=cuda_graphs)
        executor = Executor(FakeModel(), config)
        for number, params in enumerate([*SAMPLED, *EDITED]):
            prompt = [(7 * number + i) % 97 for i in range(1 if one_token else 2 + 3 * number)]
            executor.add_request(NewRequest(f"{number}", prompt, params))
        return run_all(executor)

    expected = run(cuda_graphs=False)
    assert set(given) == {-1}
    assert run(cuda_graphs=True) == expected
    # Once the edited requests have ended all steps are sampled from by their graphs.
    assert {1, 2, 3} <= set(given)
    assert -1 in given


def test_padding_does_not_touch_a_requests_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_find_op", lambda device: draw_all)
    model = FakeModel()
    model.allocate_kv_cache(20)
    sampler = sampler_module.Sampler(6, model.device)
    for slot in range(6):
        sampler.set_slot(slot, SamplingParams(temperature=0), 0)
    dispatcher = Dispatcher(model, replace(LIMITS, max_num_seqs=6), sampler)
    dispatcher.capture()
    sampler.last_tokens.fill_(-7)
    step = build([request(7 + i, i, 3 * i) for i in range(3)])
    draws = sampler.plan(np.array([4, 0, 2]), np.array([1, 2, 3]))
    logits, tokens = dispatcher.forward_sampled(step, draws)
    assert tokens is not None
    assert tokens[:3].tolist() == logits[:3].argmax(-1).tolist()
    assert sampler.last_tokens[[4, 0, 2]].tolist() == tokens[:3].tolist()
    assert sampler.last_tokens[[1, 3, 5]].tolist() == [-7] * 3
    dispatcher.forward(step)  # and nobody's, where somebody else is to sample
    sampler.last_tokens.fill_(-7)
    dispatcher.forward(step)
    assert sampler.last_tokens.tolist() == [-7] * 6


def test_steps_that_the_host_padded_are_taken_as_they_are() -> None:
    """And give what the graph's own padding gives."""
    model, dispatcher = make()
    given = [request(7 + i, i, 3 * i) for i in range(3)]
    size = LIMITS.block_size
    padded = build_step(
        FlatRequests.of(given, size), size, num_tokens=8, num_requests=6, num_logits=6
    )
    found = []
    for step in (build(given), padded):
        logits = dispatcher.forward(step)[:3].clone()
        run = model.steps[-1]
        names = ("seq_lens", "query_start_loc", "slot_mapping")
        found.append([logits, *(getattr(run, name).clone() for name in names)])
    for own, taken in zip(*found, strict=True):
        assert torch.equal(own, taken)
    assert model.steps[-1].input_ids.tolist() == [7, 8, 9, 9], "as the host padded it"
    assert dispatcher.num_replayed == 2


def test_warming_up_runs_every_kind_of_step() -> None:
    model = FakeModel()
    model.allocate_kv_cache(20)
    sampler = sampler_module.Sampler(6, model.device)
    seen: list[tuple[int, torch.dtype]] = []

    def op(logits: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((len(logits), logits.dtype))
        return draw_all(logits, *rest)

    sampler._op = op
    dispatcher = Dispatcher(model, replace(LIMITS, max_num_seqs=6), sampler)
    dispatcher.capture()
    model.steps.clear()
    assert dispatcher.warm_up(num_logits=8) == 0, "on a CPU no memory is measured"
    sizes = [len(step.input_ids) for step in model.steps]
    assert sizes[0] == LIMITS.max_num_tokens
    assert {len(step.logits_indices) for step in model.steps} >= {2, 4, 8}
    assert {step.block_tables.shape[2] for step in model.steps} == {1, WIDTH}
    assert {(len(step.input_ids), len(step.seq_lens)) for step in model.steps} >= {(6, 6), (12, 6)}
    assert {rows for rows, _ in seen} >= {2, 4, 8}
    assert torch.float32 in {dtype for _, dtype in seen}
    assert sampler.last_tokens.tolist() == [0] * 6, "no request's token is touched"
