"""A request's greedy tokens are Hugging Face's, whatever the runtime does with it.

Real models of unlike kinds, each through an executor: alone and among others, chunked, with hits in
the prefix cache, from the host, preempted, overlapped, padded. What makes the comparison mean
something is in `toys`: models that can tell, and here faults that it must notice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from inlay import compile_model
from inlay.backends import step
from inlay.backends.base import LoadedModel
from inlay.passes.check import relative_rms
from inlay.runtime import block_pool, dispatch
from inlay.runtime.batch import Batch
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.request import Request, RequestOptions
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import Scheduler
from inlay.verify.tokens import TokenComparison, count_tokens
from tests.runtime.driver import Driver
from tests.runtime.slow_device import SlowDevice
from tests.toys import ARCHITECTURES, build_toy

BLOCK = 16
UNLIKE = ("llama", "gemma3_text", "qwen3_moe", "gpt_oss")
"""Full attention; windows in a KV group of their own; experts; all of these with sinks."""

COMPILED = ("gpt_oss",)
"""Run on Inductor by default; tests/test_architectures.py compiles the same segments."""


class Subject:
    """A compiled model and the Hugging Face model that it must be equal to."""

    def __init__(self, name: str, backend: str) -> None:
        self.reference: PreTrainedModel = build_toy(name)
        self.engine = compile_model(self.reference, backend, dtype="float32", block_size=BLOCK)
        self.model: LoadedModel = self.engine.load_model()
        self.error: float = self.engine.manifest["errors"]["engine"]
        self._seen: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Hugging Face's, [tokens, vocab]."""
        key = tuple(tokens)
        if key not in self._seen:
            found = self.reference(input_ids=torch.tensor([tokens]), use_cache=False)
            self._seen[key] = found.logits[0].float()
        return self._seen[key]

    def compare(self, driver: Driver) -> TokenComparison:
        """All tokens of all greedy requests; DESIGN.md section 9 says what may be excused."""
        total = TokenComparison(0, 0, 0)
        for name, prompt in driver.prompts.items():
            output = driver.tokens(name)
            assert output
            logits = self.logits([*prompt, *output])[len(prompt) - 1 : -1]
            total += count_tokens(torch.tensor(output), logits, self.error)
        return total

    def check(self, driver: Driver) -> None:
        comparison = self.compare(driver)
        assert comparison.passed, comparison
        driver.close()


_subjects: dict[tuple[str, str], Subject] = {}


def subject_of(name: str, backend: str = "eager") -> Subject:
    """Built once for all tests of this process."""
    if (name, backend) not in _subjects:
        _subjects[name, backend] = Subject(name, backend)
    return _subjects[name, backend]


def cases() -> Any:
    """Every architecture on both backends; slow but for a few."""
    params = []
    for backend, quick in (("eager", UNLIKE), ("inductor", COMPILED)):
        for name in ARCHITECTURES:
            marks = () if name in quick else (pytest.mark.slow,)
            params.append(pytest.param(backend, name, marks=marks, id=f"{backend}-{name}"))
    return pytest.mark.parametrize(("backend", "name"), params)


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(f"{count} {seed}").choices(range(3, 128), k=count)


PROMPTS = [tokens(count, 0) for count in (1, 5, 19, 40, 2, 33, 90)]
LONG = PROMPTS[-1]


def add_all(driver: Driver, label: str = "", **changes: Any) -> None:
    """Unlike requests, which stop after unlike numbers of tokens."""
    for index, prompt in enumerate(PROMPTS):
        driver.add(f"{label}{index}", prompt, max_tokens=6 + 2 * index, **changes)


def run_all(model: LoadedModel, **options: Any) -> Driver:
    driver = Driver(model, **options)
    add_all(driver)
    driver.run()
    return driver


# --- the ways in which a request may be run ------------------------------------------------------


def alone(model: LoadedModel) -> Driver:
    driver = Driver(model, enable_prefix_caching=False)
    for index, prompt in enumerate(PROMPTS):
        driver.add(str(index), prompt)
        driver.run()
    return driver


def together(model: LoadedModel) -> Driver:
    return run_all(model)


def together_twice(model: LoadedModel) -> Driver:
    driver = run_all(model)
    add_all(driver, "again ")
    driver.run()
    return driver


def in_chunks(model: LoadedModel) -> Driver:
    """Budget and slots so small that requests join while others decode."""
    return run_all(model, max_num_tokens=13, max_num_seqs=3)


def padded(model: LoadedModel) -> Driver:
    """Three requests, so short that each token counts, in buckets of four; then more."""
    driver = Driver(model, cuda_graphs=True, max_num_tokens=24)
    for index in range(3):
        driver.add(f"three {index}", tokens(3, index))
    driver.run()
    assert driver.executor.get_stats()["num_graph_steps"] > 10
    add_all(driver)
    driver.run()
    return driver


def overlapped(model: LoadedModel) -> Driver:
    driver = Driver(model, SlowDevice(0), overlap=True, max_num_tokens=40)
    add_all(driver)
    in_flight = 0
    while driver.executor.has_unfinished:
        driver.step()
        in_flight += bool(driver.executor._in_flight)
    assert in_flight > 15
    return driver


def overlapped_and_padded(model: LoadedModel) -> Driver:
    options = {"overlap": True, "cuda_graphs": True, "max_num_tokens": 24, "max_num_seqs": 5}
    driver = Driver(model, SlowDevice(1), **options)
    add_all(driver)
    driver.run()
    assert driver.executor.get_stats()["num_graph_steps"] > 10
    return driver


def with_prefixes(model: LoadedModel) -> Driver:
    """Prefixes that were run before, others' in the same batch, and none after a reset."""
    driver = run_all(model)
    add_all(driver, "again ")
    for seed in range(3):
        driver.add(f"tail {seed}", LONG[: 20 * seed + 40] + tokens(7, seed))
    driver.run()
    hits = {name: driver.num_cached_tokens(name) for name in driver.prompts}
    assert hits["6"] == 0
    assert hits["again 6"] == 80
    assert [hits[f"tail {seed}"] for seed in range(3)] == [32, 48, 80]
    driver.executor.reset_prefix_cache()
    add_all(driver, "anew ")
    driver.run()
    assert all(driver.num_cached_tokens(f"anew {i}") == 0 for i in range(len(PROMPTS)))
    return driver


def salted(model: LoadedModel) -> Driver:
    """The same prompt three times; those of one salt share, others do not."""
    driver = Driver(model)
    for name, salt in (("mine", "a"), ("yours", "b"), ("mine again", "a")):
        driver.add(name, LONG, options=RequestOptions(cache_salt=salt))
        driver.run()
    assert [driver.num_cached_tokens(name) for name in driver.prompts] == [0, 0, 80]
    return driver


def evicted(model: LoadedModel, **options: Any) -> Driver:
    """What a request left in the cache has made room for others when it comes again."""
    driver = Driver(model, kv_cache_tokens=160, **options)
    driver.add("first", LONG)
    driver.run()
    for seed in range(2):
        driver.add(f"other {seed}", tokens(100, seed + 1))
        driver.run()
    driver.add("again", LONG)
    driver.run()
    return driver


def evicted_for_good(model: LoadedModel) -> Driver:
    driver = evicted(model)
    assert driver.num_cached_tokens("again") == 0
    return driver


def from_the_host(model: LoadedModel) -> Driver:
    driver = evicted(model, host_cache_memory=1 << 20, kv_events=True)
    events = [event["kind"] for event in driver.executor.get_kv_events()]
    assert events.count("offloaded") > 5
    assert driver.num_cached_tokens("again") == 80
    return driver


def out_of_room(model: LoadedModel) -> Driver:
    """Blocks run out while requests decode; some give way, and are computed again."""
    options = {"scheduler_policy": "max_utilization", "kv_cache_tokens": 128, "max_num_tokens": 50}
    driver = run_all(model, **options)
    assert driver.executor.get_stats()["num_preemptions"] > 0
    return driver


def preempted(model: LoadedModel, **options: Any) -> Driver:
    """Each in turn, in the middle of its prompt or of its output; nothing of it is in the cache."""
    driver = Driver(model, max_num_tokens=30, **options)
    add_all(driver)
    number = 0
    while driver.executor.has_unfinished:
        driver.step()
        number += 1
        running = driver.executor.scheduler.running
        if number % 3 == 0 and number < 40 and running:
            driver.executor.scheduler.preempt(running[number % len(running)])
    return driver


def preempted_without_cache(model: LoadedModel) -> Driver:
    return preempted(model, enable_prefix_caching=False)


WAYS: list[Callable[[LoadedModel], Driver]] = [
    alone, together, in_chunks, padded, overlapped, overlapped_and_padded, with_prefixes, salted,
    evicted_for_good, from_the_host, out_of_room, preempted, preempted_without_cache,
]  # fmt: skip


@cases()
def test_tokens_are_those_of_hugging_face(backend: str, name: str) -> None:
    subject = subject_of(name, backend)
    for way in WAYS:
        subject.check(way(subject.model))


# --- faults that the comparison notices -----------------------------------------------------------


def wrong_blocks(patch: pytest.MonkeyPatch) -> None:
    """Prefixes of equal length are taken for equal."""
    patch.setattr(block_pool, "block_hash", lambda parent, tokens, salt: (parent or b"") + b"x")


def stale_blocks(patch: pytest.MonkeyPatch) -> None:
    """A block that others overwrite is still found by what it held."""
    patch.setattr(block_pool.BlockPool, "forget", lambda self, block: None)


def live_padding(patch: pytest.MonkeyPatch) -> None:
    """Padding writes into the cache's second slot."""
    for module in (dispatch, step):  # that of graphs, and of the steps that come padded
        patch.setattr(module, "PADDING_SLOT", 1)


def stale_preempted(patch: pytest.MonkeyPatch) -> None:
    """Of a preempted request only its last token is run again."""
    put = Scheduler._put

    def fault(self: Scheduler, request: Request, count: int, *rest: Any) -> None:
        if request.epoch and count > 1:
            request.num_computed_tokens += count - 1
            count = 1
        put(self, request, count, *rest)

    patch.setattr(Scheduler, "_put", fault)


def short_windows(patch: pytest.MonkeyPatch) -> None:
    """Blocks that the window still reaches are given back."""
    seen = KVCache._first_seen

    def fault(self: KVCache, num_tokens: int, window: int) -> int:
        return seen(self, num_tokens, window) + 1

    patch.setattr(KVCache, "_first_seen", fault)


def unknown_tokens(patch: pytest.MonkeyPatch) -> None:
    """A token that the host has not read yet is not put into the next step."""
    patch.setattr(Batch, "fill_in", lambda self, step, last_tokens: None)


FAULTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[LoadedModel], Driver]]] = [
    (wrong_blocks, together_twice),
    (stale_blocks, evicted),
    (live_padding, padded),
    (stale_preempted, preempted_without_cache),
    (short_windows, together),
    (unknown_tokens, overlapped),
]


@pytest.mark.parametrize(("fault", "way"), FAULTS)
def test_a_fault_gives_other_tokens(
    fault: Callable[[pytest.MonkeyPatch], None],
    way: Callable[[LoadedModel], Driver],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = subject_of("gemma3_text")
    subject.check(way(subject.model))
    fault(monkeypatch)
    monkeypatch.setattr(Scheduler, "check", lambda self: None)  # it must not come to its help
    start_with_zeros(subject.model, monkeypatch)
    driver = way(subject.model)
    assert subject.compare(driver).num_wrong > 0


def start_with_zeros(model: LoadedModel, patch: pytest.MonkeyPatch) -> None:
    """What was never written is not NaN, which anybody would notice."""
    allocate = model.allocate_kv_cache

    def allocating(*args: Any) -> None:
        allocate(*args)
        for group in range(len(model.kv_groups)):
            for tensor in model.kv_tensors(group):
                tensor.zero_()

    patch.setattr(model, "allocate_kv_cache", allocating)


def test_a_salt_that_is_ignored_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_pool.block_hash
    monkeypatch.setattr(block_pool, "block_hash", lambda parent, ids, salt: right(parent, ids, ""))
    with pytest.raises(AssertionError, match=r"80"):
        salted(subject_of("llama").model)


# --- sampling, beams, log probabilities, embeddings ----------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_several_sequences_are_those_of_single_requests(name: str) -> None:
    """Forked behind a prompt that ends within a block; each has the seed that it has alone."""
    model = subject_of(name).model
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
    together = Driver(model, max_num_tokens=25)
    for index, prompt in enumerate(PROMPTS[2:6]):
        together.add(str(index), prompt, params, n=2 + index % 2, seed=100 * index)
    together.run()
    single = Driver(model)
    for index, prompt in enumerate(PROMPTS[2:6]):
        found = [together.tokens(str(index), one) for one in range(2 + index % 2)]
        assert found[0] != found[1]
        for one, output in enumerate(found):
            single.add(f"{index} {one}", prompt, params, seed=100 * index + one)
            single.run()
            assert single.tokens(f"{index} {one}") == output


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_beams_are_those_of_hugging_face(name: str) -> None:
    """Two searches and a greedy request at once, in chunks."""
    subject, prompts = subject_of(name), [tokens(21, 1), tokens(50, 2)]
    driver = Driver(subject.model, max_num_tokens=20)
    beams = SamplingParams(
        use_beam_search=True, temperature=0, n=2, best_of=3, max_tokens=10, ignore_eos=True
    )
    for index, prompt in enumerate(prompts):
        driver.add(str(index), prompt, beams)
    driver.add("greedy", LONG)
    driver.run()
    for index, prompt in enumerate(prompts):
        expected = subject.reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert [driver.tokens(str(index), one) for one in range(2)] == [
            row[len(prompt) :] for row in expected.sequences.tolist()
        ]
        scores = [output.cumulative_logprob for output in driver.outputs[str(index)]]
        # Sums of 10 log probabilities, each with the logits' error of at most 1e-4.
        assert [score / 10 for score in scores if score is not None] == pytest.approx(
            expected.sequences_scores.tolist(), abs=1e-3
        )


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_log_probabilities_are_those_of_hugging_face(name: str) -> None:
    """Of prompts, cut into chunks and not, and of what is generated, in one batch with others."""
    subject = subject_of(name)
    for max_num_tokens in (23, 200):
        driver = Driver(subject.model, max_num_tokens=max_num_tokens)
        add_all(driver, prompt_logprobs=1, logprobs=0)
        driver.run()
        for label, prompt in driver.prompts.items():
            output = driver.tokens(label)
            whole = [*prompt, *output]
            expected = subject.logits(whole)[:-1].log_softmax(-1)
            expected = expected.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
            steps = driver.outputs[label]
            found = [place for step in steps for place in (*step.prompt_logprobs, *step.logprobs)]
            assert found[0] is None
            ours = [place[t].logprob for t, place in zip(whole[1:], found[1:], strict=True)]
            # The logits' RMS is near 10 at most, and their error at most 1e-4 of it.
            torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_embeddings_are_hugging_faces_hidden_states(name: str) -> None:
    subject = subject_of(name)
    driver = Driver(subject.model, max_num_tokens=23)
    for pooling in ("last", "mean", "cls"):
        options = RequestOptions(pooling=pooling, normalize=False)
        for index, prompt in enumerate(PROMPTS):
            driver.add(f"{pooling} {index}", prompt, SamplingParams(), options)
    driver.add("greedy", LONG)
    driver.run()
    for index, prompt in enumerate(PROMPTS):
        states = subject.reference.model(torch.tensor([prompt])).last_hidden_state[0]
        pooled = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}
        for pooling, expected in pooled.items():
            (output,) = driver.outputs[f"{pooling} {index}"]
            assert output.embedding is not None
            assert relative_rms(expected, torch.tensor(output.embedding)) <= 1e-4


# --- cache formats -------------------------------------------------------------------------------

ROUNDING = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 2**-7, "fp8": 2**-4}
"""The largest relative error of a value (int8: of the largest of a token's head)."""


@pytest.mark.parametrize("dtype", ROUNDING)
def test_another_cache_format_is_close(dtype: str) -> None:
    """Errors of values spread out: they add up less than linearly, and do not vanish."""
    model = subject_of("gemma3_text").model
    rows = []
    for options in ({}, {"kv_cache_dtype": dtype}):
        driver = Driver(model, max_num_tokens=23, **options)
        driver.add("one", LONG)
        driver.run()
        rows.append(driver.rows("one")[0])
    error = relative_rms(*rows)
    assert ROUNDING[dtype] / 20 < error < 2 * ROUNDING[dtype]
