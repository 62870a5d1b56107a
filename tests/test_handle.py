from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from inlay.errors import EngineError, RequestError
from inlay.handle import RequestHandle
from inlay.runtime.outputs import RequestOutput
from inlay.runtime.sampling_params import SamplingParams
from tests.fake_llm import (
    GREEDY,
    PROMPTS,
    TOKENIZER,
    FakeLLM,
    alone,
    assert_idle,
    assert_usable,
    slow_down,
    wait_until,
)

LONG = replace(GREEDY, max_tokens=None)


@pytest.fixture
def llm() -> Iterator[FakeLLM]:
    with FakeLLM() as llm:
        yield llm


def test_it_is_there_at_once_and_waited_for(llm: FakeLLM) -> None:
    gate = threading.Event()

    def wait(number: int) -> None:
        gate.wait()

    llm.model.before_forward = wait
    handle = llm.generate_async("a fox", GREEDY)
    with pytest.raises(TimeoutError, match=r"request 0 has not finished within 0.01 seconds"):
        handle.result(timeout=0.01)
    assert not handle.done
    gate.set()
    output = handle.result(timeout=10)
    assert handle.done
    assert output.outputs[0].token_ids == alone(llm, "a fox", GREEDY)
    assert handle.result() == output
    assert_usable(llm)


def test_a_result_says_what_was_measured(llm: FakeLLM) -> None:
    slow_down(llm, 0.002)
    metrics = llm.generate_async("a fox", GREEDY).result().metrics
    assert metrics.queue_time is not None
    assert metrics.prefill_time is not None
    assert metrics.ttft is not None
    assert metrics.mean_itl is not None
    assert metrics.e2e_latency is not None
    assert metrics.num_output_tokens == 10
    assert 0 < metrics.queue_time < metrics.ttft < metrics.e2e_latency
    assert metrics.queue_time + metrics.prefill_time == pytest.approx(metrics.ttft)
    assert metrics.mean_itl >= 0.002, "the model sleeps so long in each step"


def test_reading_it_without_streaming_gives_the_last_output(llm: FakeLLM) -> None:
    handle = llm.generate_async("a fox", GREEDY)
    assert list(handle) == [handle.result()]


def check_stream(llm: FakeLLM, outputs: list[RequestOutput], prompt: str) -> None:
    expected = alone(llm, prompt, GREEDY)
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].token_ids == expected
    deltas = [output.outputs[0].delta for output in outputs]
    assert "".join(deltas) == TOKENIZER.decode(expected)
    assert all(deltas[:-1])


def test_several_threads_read_one_stream(llm: FakeLLM) -> None:
    slow_down(llm, 0.002)
    handle = llm.generate_async("a fox", GREEDY, streaming=True)
    read: list[list[RequestOutput]] = []
    threads = [threading.Thread(target=lambda: read.append(list(handle))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 3
    for outputs in read:
        check_stream(llm, outputs, "a fox")
    late = list(handle)
    assert len(late) == 1, "who comes late gets all of it at once"
    check_stream(llm, late, "a fox")


def test_awaiting_and_reading_in_asyncio(llm: FakeLLM) -> None:
    slow_down(llm, 0.002)

    async def read(prompt: str) -> list[RequestOutput]:
        handle = llm.generate_async(prompt, GREEDY, streaming=True)
        outputs = [output async for output in handle]
        assert await handle == handle.result()
        return outputs

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        for prompt, outputs in zip(PROMPTS, await asyncio.gather(*map(read, PROMPTS)), strict=True):
            check_stream(llm, outputs, prompt)
        ticking.cancel()
        assert ticks > 20, "the loop was blocked"

    asyncio.run(main())
    assert_usable(llm)


def test_loops_of_several_threads_wait_for_one_request(llm: FakeLLM) -> None:
    slow_down(llm, 0.002)
    handle = llm.generate_async("a fox", GREEDY, streaming=True)
    read: list[list[RequestOutput]] = []

    async def main() -> None:
        read.append([output async for output in handle])

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(3)]
    for thread in threads:
        thread.start()
    asyncio.run(main())
    for thread in threads:
        thread.join()
    assert len(read) == 4
    for outputs in read:
        check_stream(llm, outputs, "a fox")


def test_a_wait_that_is_given_up_harms_nobody(llm: FakeLLM) -> None:
    """The loop is closed, too, while the request still gives outputs."""
    slow_down(llm)
    handle = llm.generate_async("a fox", LONG, streaming=True)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.aresult(), 0.02)

    tasks: list[asyncio.Future[RequestOutput]] = []

    async def leave_a_task() -> None:
        tasks.append(asyncio.ensure_future(handle.aresult()))
        await asyncio.sleep(0.01)

    asyncio.run(main())
    asyncio.run(leave_a_task())
    assert tasks[0].cancelled()
    loop = asyncio.new_event_loop()
    left = loop.create_task(handle.aresult())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert not handle.done
    assert handle.result().outputs[0].token_ids == alone(llm, "a fox", LONG)
    assert not left.done()
    left._log_destroy_pending = False  # type: ignore[attr-defined]
    assert_usable(llm)


def test_an_abort_keeps_what_came(llm: FakeLLM) -> None:
    slow_down(llm)
    handle, other = (llm.generate_async(p, LONG, streaming=True) for p in PROMPTS[:2])
    for number, _ in enumerate(handle):
        if number == 3:
            break
    handle.abort()
    assert handle.done
    completion = handle.result().outputs[0]
    size = len(completion.token_ids)
    assert size >= 4
    assert completion.token_ids == alone(llm, "a fox", LONG)[:size]
    assert (completion.finish_reason, handle.result().error) == ("abort", None)
    handle.abort()
    llm.abort([handle.request_id, "unknown"])
    assert other.result().outputs[0].token_ids == alone(llm, PROMPTS[1], LONG)
    llm.model.before_forward = lambda number: None
    assert_usable(llm)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handle_that_nobody_holds_ends_its_request(llm: FakeLLM, is_async: bool) -> None:
    slow_down(llm, 0.05)

    async def leave() -> None:
        async for _ in llm.generate_async("a fox", LONG, streaming=True):
            break

    if is_async:
        asyncio.run(leave())
    else:
        llm.generate_async("a fox", LONG)
    wait_until(lambda: llm.get_stats()["api"]["num_finished"] == {"abort": 1})
    assert_idle(llm)


def test_a_timeout_keeps_what_came(llm: FakeLLM) -> None:
    slow_down(llm, 0.02)
    outputs = llm.generate(PROMPTS, LONG, use_tqdm=False, timeout=[0.2, None, 0.2])
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["timeout", "length", "timeout"]
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert ids == alone(llm, prompt, LONG)[: len(ids)]
        assert len(ids) > 2
        assert output.error is None
    assert_usable(llm)


def test_options_of_requests(llm: FakeLLM) -> None:
    prompt = list(range(20))
    for name, bad in (("priority", "high"), ("timeout", -1), ("cache_salt", 5)):
        with pytest.raises(RequestError, match=f"prompt 0: {name} must be"):
            llm.generate([prompt], GREEDY, **{name: bad})  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=f"prompt 1: {name} must be"):
            llm.generate([prompt] * 2, GREEDY, **{name: [None if name != "priority" else 0, bad]})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority must be one for all prompts, or a list of 2"):
        llm.generate([prompt] * 2, GREEDY, priority=[1, 2, 3])
    llm.generate([prompt], GREEDY, use_tqdm=False, cache_salt="a")
    salts = ["a", "b", None]
    outputs = llm.generate([prompt] * 3, GREEDY, use_tqdm=False, cache_salt=salts)
    assert [output.num_cached_tokens > 0 for output in outputs] == [True, False, False]


def test_lower_priorities_run_first() -> None:
    with FakeLLM(max_num_seqs=1) as llm:
        slow_down(llm, 0.02)
        first = llm.generate_async("a fox", GREEDY)
        handles = [llm.generate_async("x", GREEDY, priority=p) for p in (3, 1, 2)]
        ends = [handle.result().metrics.finish_time or 0 for handle in [first, *handles]]
    assert ends[0] < ends[2] < ends[3] < ends[1]


def test_several_sequences(llm: FakeLLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=8, logprobs=0)
    handle = llm.generate_async("a fox", params, streaming=True)
    outputs = list(handle)
    last = outputs[-1].outputs
    assert len({tuple(one.token_ids) for one in last}) == 3
    for index in range(3):
        joined = "".join(output.outputs[index].delta for output in outputs)
        assert joined == last[index].text == TOKENIZER.decode(last[index].token_ids)
    best = SamplingParams(n=2, best_of=3, seed=4, max_tokens=8, logprobs=0)
    chosen = llm.generate("a fox", best, use_tqdm=False)[0].outputs
    ranked = sorted(last, key=lambda one: one.cumulative_logprob or 0, reverse=True)
    assert [one.token_ids for one in chosen] == [one.token_ids for one in ranked[:2]]
    assert len(list(llm.generate_async("a fox", best, streaming=True))) == 1
    beams = SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=8)
    found = llm.generate("a fox", beams, use_tqdm=False)[0].outputs
    assert [one.finish_reason for one in found] == ["length"] * 2
    assert (found[0].cumulative_logprob or 0) > (found[1].cumulative_logprob or 0)
    assert_usable(llm)


def test_a_stop_string_in_one_sequence_leaves_the_others(llm: FakeLLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=20)
    free = llm.generate("a fox", params, use_tqdm=False)[0].outputs
    others = free[0].text + free[2].text
    stop = next(c for c in free[1].text if c not in others)
    slow_down(llm, 0.002)
    outputs = llm.generate("a fox", replace(params, stop=stop), use_tqdm=False)[0].outputs
    assert [one.finish_reason for one in outputs] == ["length", "stop", "length"]
    assert outputs[1].text == free[1].text[: free[1].text.index(stop)]
    assert [one.token_ids for one in (outputs[0], outputs[2])] == [
        free[0].token_ids,
        free[2].token_ids,
    ]
    assert_usable(llm)


def test_a_bounded_queue() -> None:
    with FakeLLM(max_queue_size=3) as llm:
        most = 0

        def count(number: int) -> None:
            nonlocal most
            most = max(most, llm._frontend.processor.num_unfinished)

        llm.model.before_forward = count
        outputs = llm.generate([[n] for n in range(20)], GREEDY, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [
            alone(llm, [n], GREEDY) for n in range(20)
        ]
        assert most == 3
        slow_down(llm, 0.02)
        handles = [llm.generate_async("x", GREEDY) for _ in range(3)]
        with pytest.raises(RequestError, match="overloaded: 3 requests are under way"):
            llm.generate_async("x", GREEDY)
        with pytest.raises(RequestError, match="overloaded"):
            llm.stream("x", GREEDY)
        handles[0].abort()
        assert llm.generate("x", GREEDY, use_tqdm=False)[0].finished
        assert_usable(llm)


def test_a_thousand_requests_of_which_half_are_aborted(llm: FakeLLM) -> None:
    rng = random.Random(0)
    finished: Counter[str] = Counter()
    lock = threading.Lock()
    params = [replace(GREEDY, max_tokens=n) for n in (1, 3, 6)]

    def submit(seed: int) -> list[RequestHandle]:
        own = random.Random(seed)
        handles = []
        for _ in range(250):
            prompt = [own.randrange(200) for _ in range(own.randrange(1, 9))]
            handles.append(
                llm.generate_async(prompt, own.choice(params), priority=own.randrange(3))
            )
            if own.random() < 0.5:
                own.choice(handles).abort()
        return handles

    def run(seed: int) -> None:
        handles = submit(seed)
        for handle in handles:
            output = handle.result(timeout=60)
            ids, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
            expected = alone(llm, output.prompt_token_ids, GREEDY) if rng.random() < 0.1 else ids
            assert ids == expected[: len(ids)], "another request's tokens"
            assert reason is not None
            with lock:
                finished[reason] += 1

    failures: list[BaseException] = []
    threads = [threading.Thread(target=_noting(run, failures), args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert finished.total() == 1000
    assert set(finished) == {"length", "abort"}
    assert min(finished.values()) > 200
    assert llm.get_stats()["api"]["num_finished"] == finished
    assert_usable(llm)


def _noting(run, failures: list[BaseException]):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> None:
        try:
            run(*arguments)
        except BaseException as error:
            failures.append(error)

    return call


def test_threads_share_the_engine(llm: FakeLLM) -> None:
    failures: list[BaseException] = []

    def run(start: int) -> None:
        prompts: list[list[int]] = [[start + n, n] for n in range(10)]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        expected = [alone(llm, prompt, GREEDY) for prompt in prompts]
        assert [output.outputs[0].token_ids for output in outputs] == expected
        *_, last = llm.stream([start], GREEDY)
        assert last.outputs[0].token_ids == alone(llm, [start], GREEDY)

    threads = [threading.Thread(target=_noting(run, failures), args=(20 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert_usable(llm)


def test_the_engines_end_raises_for_all_who_wait(llm: FakeLLM) -> None:
    slow_down(llm, 0.02)
    handle = llm.generate_async("a fox", LONG, streaming=True)
    failures: list[BaseException] = []
    call = _noting(lambda: llm.generate(PROMPTS, LONG, use_tqdm=False), failures)
    thread = threading.Thread(target=call)
    thread.start()
    next(iter(handle))
    llm.shutdown()
    llm.shutdown()
    thread.join()
    assert [type(error) for error in failures] == [EngineError]
    for wait in (handle.result, lambda: list(handle), lambda: asyncio.run(handle.aresult())):
        with pytest.raises(EngineError, match="the LLM was shut down"):
            wait()
    for method in (llm.get_stats, lambda: llm.generate("x"), lambda: llm.stream("x")):
        with pytest.raises(EngineError, match=r"shut down; restart\(\)"):
            method()
    llm.abort(handle.request_id)
    llm.restart()
    assert llm.generate("a fox", GREEDY, use_tqdm=False)[0].finished
    assert llm._frontend.processor.num_unfinished == 0


def test_a_request_keeps_its_llm() -> None:
    handle = FakeLLM().generate_async("a fox", GREEDY)
    assert handle.result().finished
    *_, last = FakeLLM().stream("a fox", GREEDY)
    assert last.outputs[0].finish_reason == "length"


def test_a_forgotten_llm_closes_its_engine() -> None:
    llm = FakeLLM()
    clients, finished = [llm._frontend.client], threading.active_count()
    llm.generate("a fox", GREEDY, use_tqdm=False)
    model = weakref.ref(llm.model)
    del llm
    wait_until(lambda: not clients[0].alive)
    clients.clear()
    wait_until(lambda: threading.active_count() < finished)
    gc.collect()
    assert model() is None, "something holds the engine"
