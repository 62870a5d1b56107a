from __future__ import annotations

from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request, RequestState
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import Scheduler


def make_scheduler(
    num_blocks: int = 100, max_num_seqs: int = 4, max_num_tokens: int = 8
) -> Scheduler:
    cache = KVCache(2, num_blocks, block_size=4, max_num_seqs=max_num_seqs, max_seq_len=60)
    return Scheduler(cache, max_num_seqs, max_num_tokens)


def make_request(name: str, num_prompt_tokens: int, max_tokens: int = 10) -> Request:
    return Request(
        request_id=name,
        token_ids=[1] * num_prompt_tokens,
        params=SamplingParams(),
        seed=0,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        max_total_tokens=num_prompt_tokens + max_tokens,
    )


def run_step(scheduler: Scheduler) -> list[tuple[str, int, bool]]:
    """What was scheduled: name, tokens, whether logits are wanted; and pretend it ran."""
    scheduled, _ = scheduler.schedule()
    plan = [(s.request.request_id, s.num_tokens, s.needs_logits) for s in scheduled]
    for item in scheduled:
        needs_logits = item.needs_logits
        item.request.num_computed_tokens += item.num_tokens
        if needs_logits:
            item.request.append(2)
    scheduler.check()
    return plan


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
    old, young = make_request("old", 30), make_request("young", 2)
    scheduler.add(old)
    run_step(scheduler)
    scheduler.add(young)
    old.num_computed_tokens = 24
    assert run_step(scheduler) == [("old", 6, True), ("young", 2, True)]
    old.token_ids += [1] * 9
    assert run_step(scheduler) == [("young", 1, True), ("old", 7, False)]


def test_no_more_requests_than_slots() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, 1))
    assert [name for name, _, _ in run_step(scheduler)] == ["a", "b"]
    scheduler.finish(scheduler.running[0])
    assert [name for name, _, _ in run_step(scheduler)] == ["b", "c"]


def test_admission_waits_for_all_blocks_and_keeps_the_order() -> None:
    """b does not fit beside a; c would, but must not overtake b for ever."""
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_request("a", 2, max_tokens=10))
    scheduler.add(make_request("b", 2, max_tokens=14))
    scheduler.add(make_request("c", 2, max_tokens=2))
    assert [name for name, _, _ in run_step(scheduler)] == ["a"]
    assert scheduler.kv_cache.num_free_blocks == 3
    scheduler.finish(scheduler.running[0])
    assert [name for name, _, _ in run_step(scheduler)] == ["b", "c"]
    assert scheduler.kv_cache.num_free_blocks == 1


def test_admitted_requests_are_reported_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20))
    _, admitted = scheduler.schedule()
    assert [request.request_id for request in admitted] == ["a"]
    assert scheduler.schedule()[1] == []


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
    assert make_scheduler().schedule() == ([], [])
