from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from inlay.backends.base import ModelLimits
from inlay.runtime import scheduler as scheduler_module
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request, RequestOptions, RequestState
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import Schedule, Scheduler

ORDER = itertools.count()


def make_scheduler(
    num_blocks: int = 100,
    max_num_seqs: int = 4,
    max_num_tokens: int = 8,
    windows: tuple[int, ...] = (0, 6),
    **options: Any,
) -> Scheduler:
    cache = KVCache([num_blocks] * len(windows), windows, 4, max_num_seqs, 60)
    limits = ModelLimits(97, 60, max_num_tokens, max_num_seqs, 4)
    return Scheduler(cache, limits, **{"max_logits": 256, **options})


def make_request(
    name: str,
    prompt: int | list[int],
    max_tokens: int = 10,
    params: SamplingParams | None = None,
    **options: Any,
) -> Request:
    tokens = [1] * prompt if isinstance(prompt, int) else list(prompt)
    return Request(
        request_id=name,
        token_ids=tokens,
        params=params or SamplingParams(),
        seed=0,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        max_total_tokens=len(tokens) + max_tokens,
        options=RequestOptions(**options),
        order=next(ORDER),
    )


def with_siblings(leader: Request, count: int) -> Request:
    for index in range(1, count):
        sibling = make_request(leader.request_id, leader.token_ids, 0)
        sibling.index, sibling.order = index, leader.order
        sibling.max_total_tokens = leader.max_total_tokens
        sibling.state = RequestState.UNFORKED
        leader.siblings.append(sibling)
    return leader


def pretend(scheduler: Scheduler, schedule: Schedule) -> list[tuple[str, int, bool]]:
    """Name, tokens, whether logits are wanted of what was scheduled; and all of it has run."""
    for item in schedule.items:
        request = item.request
        request.num_computed_tokens = item.end
        family = [request]
        if item.needs_logits:
            request.token_ids.append(2)
            family += scheduler.fork(request)
        scheduler.commit(request, item.end)
        for one in family:
            if len(one.token_ids) >= one.max_total_tokens:
                scheduler.finish(one)
    scheduler.check()
    return [(i.request.request_id, i.num_tokens, i.needs_logits) for i in schedule.items]


def run_step(scheduler: Scheduler) -> list[tuple[str, int, bool]]:
    return pretend(scheduler, scheduler.schedule())


def names(plan: list[tuple[str, int, bool]]) -> list[str]:
    return [name for name, _, _ in plan]


def run_out(scheduler: Scheduler, limit: int = 500) -> list[list[str]]:
    """Until nothing is left."""
    plans = []
    while scheduler.has_unfinished:
        plans.append(names(run_step(scheduler)))
        assert len(plans) < limit, "something is stuck"
    assert scheduler.kv_cache.num_used_blocks == 0
    return plans


def test_long_prompts_are_chunked_and_share_steps_with_decodes() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    scheduler.add(make_request("b", 14))
    scheduler.add(make_request("c", 2))
    assert run_step(scheduler) == [("a", 3, True), ("b", 5, False)]
    assert run_step(scheduler) == [("a", 1, True), ("b", 7, False)]
    assert run_step(scheduler) == [("a", 1, True), ("b", 2, True), ("c", 2, True)]
    assert run_step(scheduler) == [("a", 1, True), ("b", 1, True), ("c", 1, True)]


def test_decodes_go_before_chunks_of_older_requests() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("old", 11))
    scheduler.add(make_request("young", 2))
    assert run_step(scheduler) == [("old", 8, False)]
    assert run_step(scheduler) == [("old", 3, True), ("young", 2, True)]
    scheduler.preempt(scheduler.running[0])
    assert run_step(scheduler) == [("young", 1, True), ("old", 7, False)]


def test_no_more_requests_than_slots() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, 1))
    assert names(run_step(scheduler)) == ["a", "b"]
    scheduler.finish(scheduler.running[0])
    assert names(run_step(scheduler)) == ["b", "c"]


def test_admission_waits_for_all_blocks_and_keeps_the_order() -> None:
    """b does not fit beside a; c would, but must not overtake b for ever."""
    scheduler = make_scheduler(num_blocks=6, windows=(0,))
    scheduler.add(make_request("a", 2, max_tokens=10))
    scheduler.add(make_request("b", 2, max_tokens=14))
    scheduler.add(make_request("c", 2, max_tokens=2))
    assert names(run_step(scheduler)) == ["a"]
    assert scheduler.kv_cache.available().tolist() == [3]
    scheduler.finish(scheduler.running[0])
    assert names(run_step(scheduler)) == ["b", "c"]
    assert scheduler.kv_cache.available().tolist() == [1]


def test_admitted_requests_are_reported_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20))
    assert [request.request_id for request in scheduler.schedule().admitted] == ["a"]
    assert scheduler.schedule().admitted == []


def test_finish_in_every_state() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_request("a", 2), make_request("b", 2)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    scheduler.finish(waiting)
    scheduler.finish(running)
    scheduler.finish(running)
    assert running.state is waiting.state is RequestState.FINISHED
    assert not scheduler.has_unfinished
    assert scheduler.kv_cache.num_used_blocks == 0
    scheduler.check()


def test_nothing_to_do_is_an_empty_step() -> None:
    schedule = make_scheduler().schedule()
    assert (schedule.items, schedule.admitted) == ([], [])


def test_the_last_in_rank_gives_way_and_comes_back() -> None:
    """12 blocks for 3 requests of up to 6: somebody has to make room, twice."""
    scheduler = make_scheduler(12, windows=(0,), policy="max_utilization", max_num_tokens=16)
    ranked = [make_request(name, 5, max_tokens=18) for name in "abc"]
    for request in reversed(ranked):
        scheduler.add(request)
    preempted = []
    while scheduler.has_unfinished:
        before = list(scheduler.running)
        schedule = scheduler.schedule()
        gone = [one for one in before if one not in scheduler.running]
        preempted += [one.request_id for one in gone]
        if gone:
            assert gone == [max(before, key=lambda one: one.rank)]
            assert gone[0] not in [item.request for item in schedule.items]
            assert (gone[0].slot, gone[0].num_computed_tokens) == (-1, 0)
            assert not schedule.admitted, "who is let in would have to go again"
        pretend(scheduler, schedule)
    assert "a" not in preempted
    assert set(preempted) == {"b", "c"} or preempted == ["c"]
    assert all(len(request.token_ids) == 23 for request in ranked)


def test_a_request_that_runs_alone_makes_no_room_for_itself_for_ever() -> None:
    """Chunks that fit while the whole does not, beside a pinned prefix."""
    scheduler = make_scheduler(
        8, windows=(0,), policy="max_utilization", prefix_caching=True, max_num_tokens=4
    )
    first = make_request("first", list(range(16)), max_tokens=1)
    scheduler.add(first)
    run_out(scheduler)
    assert scheduler.kv_cache.pin(first.name_blocks(4)) == 4
    every = SamplingParams(prompt_logprobs=0)
    scheduler.add(make_request("long", 20, max_tokens=10, params=every))
    for _ in range(60):
        run_step(scheduler)
    assert not scheduler.has_unfinished
    assert not scheduler.kv_cache.has_pins


def test_pins_that_leave_no_room_are_unpinned(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make_scheduler(8, windows=(0,), prefix_caching=True)
    first = make_request("first", list(range(12)), max_tokens=1)
    scheduler.add(first)
    run_out(scheduler)
    scheduler.kv_cache.pin(first.name_blocks(4))
    scheduler.add(make_request("fits", 4, max_tokens=10))
    scheduler.add(make_request("does not", 4, max_tokens=25))
    assert names(run_step(scheduler)) == ["fits"]
    for _ in range(9):
        run_step(scheduler)
        assert scheduler.kv_cache.has_pins or not caplog.records
    run_out(scheduler)
    assert not scheduler.kv_cache.has_pins
    assert [record.getMessage() for record in caplog.records] == [
        "pinned prefixes leave no room for a request and are unpinned"
    ]


def test_lower_priorities_run_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0)):
        scheduler.add(make_request(name, 2, max_tokens=1, priority=priority))
    assert [plan[0] for plan in run_out(scheduler)] == ["c", "a", "d", "b"]


def test_a_priority_gives_way_to_whoever_has_waited_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler_module, "AGING_STEPS", 20)
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("patient", 2, max_tokens=1, priority=9))
    ran = []
    for number in range(40):
        scheduler.add(make_request(f"{number}", 2, max_tokens=1, priority=-9))
        ran += names(run_step(scheduler))
    assert ran.index("patient") == 20


def test_a_preempted_request_waits_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "AGING_STEPS", 5)
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, max_tokens=30))
    for _ in range(10):
        run_step(scheduler)
    scheduler.preempt(scheduler.running[0])
    (request,) = scheduler.waiting
    assert scheduler._num_steps - request.waiting_since == 0
    assert request.epoch == 1
    assert run_step(scheduler) == [("a", 8, False)]
    assert run_step(scheduler) == [("a", 5, True)], "the prompt and what was sampled before"


def test_the_longest_cached_prefix_goes_first() -> None:
    scheduler = make_scheduler(max_num_seqs=1, prefix_caching=True, max_num_tokens=32)
    prefix = list(range(10, 26))
    scheduler.add(make_request("first", prefix, max_tokens=1))
    run_out(scheduler)
    scheduler.add(make_request("none", 17, max_tokens=1))
    scheduler.add(make_request("short", [*prefix[:8], *[3] * 9], max_tokens=1))
    scheduler.add(make_request("long", [*prefix, 4], max_tokens=1))
    scheduler.add(make_request("other", [*prefix, 4], max_tokens=1, cache_salt="mine"))
    scheduler.add(make_request("urgent", [2] * 17, max_tokens=1, priority=-1))
    plans = []
    while scheduler.has_unfinished:
        plans += run_step(scheduler)
    sizes = [(name, tokens) for name, tokens, _ in plans]
    assert sizes == [("urgent", 17), ("long", 1), ("short", 9), ("none", 17), ("other", 17)]


def test_the_last_token_is_always_run() -> None:
    scheduler = make_scheduler(prefix_caching=True, max_num_tokens=32)
    for _ in range(2):
        request = make_request("a", list(range(16)), max_tokens=1)
        scheduler.add(request)
        plan = run_step(scheduler)
    assert plan == [("a", 4, True)]
    assert request.num_cached_tokens == 12


@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"pooling": "cls"}])
def test_results_of_every_token_skip_none(options: dict[str, Any]) -> None:
    scheduler = make_scheduler(prefix_caching=True, max_num_tokens=32)
    prompt = list(range(16))
    scheduler.add(make_request("first", prompt, max_tokens=1))
    run_out(scheduler)
    scheduler.add(make_request("whole", prompt, max_tokens=0, **options))
    every = SamplingParams(prompt_logprobs=0)
    scheduler.add(make_request("every", prompt, max_tokens=1, params=every))
    items = scheduler.schedule().items
    assert [(i.request.request_id, i.start, i.num_tokens) for i in items] == [
        ("whole", 0, 16),
        ("every", 0, 16),
    ]
    assert [item.all_logits for item in items] == [False, True]


def test_whole_prompts_are_not_cut() -> None:
    scheduler = make_scheduler(whole_prompts=True)
    for name, size in (("a", 5), ("b", 4), ("c", 3), ("d", 8)):
        scheduler.add(make_request(name, size, max_tokens=1))
    assert run_step(scheduler) == [("a", 5, True)]
    assert run_step(scheduler) == [("b", 4, True), ("c", 3, True)]
    assert run_step(scheduler) == [("d", 8, True)]


def test_rows_of_prompt_logprobs_have_a_budget() -> None:
    scheduler = make_scheduler(max_num_tokens=30, max_logits=6)
    every = SamplingParams(prompt_logprobs=0)
    scheduler.add(make_request("a", 8, params=every))
    scheduler.add(make_request("b", 9))
    scheduler.add(make_request("c", 9))
    assert run_step(scheduler) == [("a", 6, False)]
    assert run_step(scheduler) == [("a", 2, True), ("b", 9, True), ("c", 9, True)]
    item, *others = scheduler.schedule().items
    assert not item.all_logits, "what is sampled has no such rows"
    assert len(others) == 2


def test_siblings_come_in_together_and_are_forked_when_the_prompt_has_run() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    scheduler.add(with_siblings(make_request("a", 10, max_tokens=4), 3))
    scheduler.add(with_siblings(make_request("b", 3, max_tokens=4), 2))
    assert run_step(scheduler) == [("a", 8, False)]
    assert run_step(scheduler) == [("a", 2, True)], "b needs two slots"
    assert names(run_step(scheduler)) == ["a", "a", "a"]
    # Two full blocks of the prompt, of which the window needs one, and a last one of each's own.
    assert [pool.num_used for pool in scheduler.kv_cache.pools] == [2 + 3, 1 + 3]
    run_out(scheduler)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1])
def test_one_of_a_family_can_end_before_the_fork(which: int, num_steps: int) -> None:
    """While it waits, and in the middle of its prompt."""
    scheduler = make_scheduler()
    leader = with_siblings(make_request("a", 10, max_tokens=4), 3)
    family = [leader, *leader.siblings]
    scheduler.add(leader)
    for _ in range(num_steps):
        run_step(scheduler)
    scheduler.part(leader, family[which])
    scheduler.finish(family[which])
    scheduler.check()
    run_out(scheduler)
    lengths = [len(one.token_ids) for one in family]
    assert lengths == [10 if index == which else 14 for index in range(3)]


def run_randomly(scheduler: Scheduler, seed: int, count: int) -> int:
    """Requests of all sizes; each ends with all of its tokens. Counts preemptions."""
    rng, open_, num_preempted = np.random.default_rng(seed), [], 0
    prefix = [int(token) for token in rng.integers(0, 9, 12)]
    for number in range(count):
        prompt = prefix[: rng.integers(0, 13)] + [int(t) for t in rng.integers(0, 9, 5)]
        leader = make_request(
            f"{number}",
            prompt,
            max_tokens=int(rng.integers(1, 12)),
            priority=int(rng.integers(-1, 2)),
            cache_priority=int(rng.integers(0, 2)),
        )
        scheduler.add(with_siblings(leader, int(rng.choice([1, 1, 1, 2, 3]))))
        open_ += [leader, *leader.siblings]
        for _ in range(int(rng.integers(0, 4))):
            schedule = scheduler.schedule()
            num_preempted += schedule.num_preempted
            assert sum(item.num_tokens for item in schedule.items) <= 8
            pretend(scheduler, schedule)
    for _ in range(100 * count):
        schedule = scheduler.schedule()
        num_preempted += schedule.num_preempted
        pretend(scheduler, schedule)
        if not scheduler.has_unfinished:
            break
    assert not scheduler.has_unfinished
    assert all(len(request.token_ids) == request.max_total_tokens for request in open_)
    assert scheduler.kv_cache.num_used_blocks == 0
    return num_preempted


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_promised_is_there(seed: int, prefix_caching: bool) -> None:
    """`check` asserts after every step that no more is promised than there is."""
    scheduler = make_scheduler(22, prefix_caching=prefix_caching)
    assert run_randomly(scheduler, seed, 60) == 0


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_stuck_though_many_are_preempted(seed: int, prefix_caching: bool) -> None:
    scheduler = make_scheduler(11, policy="max_utilization", prefix_caching=prefix_caching)
    assert run_randomly(scheduler, seed, 60) > 5
