"""Random requests, aborts, preemptions and failures for 20,000 steps, against each request alone.

After every step the invariants hold; every sequence is answered once, with the tokens that it gets
by itself; and at the end nothing is held.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from inlay.errors import RequestError
from inlay.runtime import executor as executor_module
from inlay.runtime.beam_search import BeamSearch
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.launcher import Launcher
from inlay.runtime.outputs import StepOutput
from inlay.runtime.request import NewRequest, RequestOptions
from inlay.runtime.sampling_params import SamplingParams
from tests.runtime.fake_model import (
    LIMITS,
    VOCAB_SIZE,
    FakeModel,
    assert_nothing_held,
    generate_alone,
    history_logits,
)
from tests.runtime.slow_device import SlowDevice

EOS = 11
STEPS = 2500
PHASES = ("prepare", "run", "sample", "read", "output")


class OutOfLuckError(Exception):
    """What is injected."""


@dataclass
class Sent:
    """A request, and what came back of each of its sequences."""

    prompt: list[int]
    params: SamplingParams
    options: RequestOptions
    aborted: bool = False
    outputs: dict[int, list[StepOutput]] = field(default_factory=lambda: defaultdict(list))

    @property
    def is_answered(self) -> bool:
        outputs = [output for mine in self.outputs.values() for output in mine]
        if any(output.error is not None for output in outputs):
            return True
        wanted = self.params.n if self.params.use_beam_search else self.params.num_sequences
        return sum(output.finished for output in outputs) == (1 if self.options.pooling else wanted)


class Traffic:
    """One executor, and everything that may happen to it."""

    def __init__(self, seed: int, launcher: Launcher | None, **options: Any) -> None:
        self.random = random.Random(seed)
        self.model = FakeModel(eos=EOS)
        config = ExecutorConfig(eos_token_ids=(EOS,), debug=True, **options)
        self.executor = Executor(self.model, config, launcher)
        self.sent: dict[str, Sent] = {}
        self.open: set[str] = set()
        self.failing: str | None = None
        self.num_failures = 0
        bases = [self._tokens(40) for _ in range(4)]
        self.prefixes = [base[:size] for base in bases for size in (0, 4, 9, 16, 30)]

    def _tokens(self, count: int) -> list[int]:
        return self.random.choices([t for t in range(VOCAB_SIZE) if t != EOS], k=count)

    def maybe_fail(self, phase: str) -> None:
        """Raises once, if it is this phase's turn."""
        if self.failing == phase:
            self.failing = None
            self.num_failures += 1
            raise OutOfLuckError(phase)

    def params(self) -> SamplingParams:
        pick = self.random.choice
        common: dict[str, Any] = {
            "max_tokens": pick([1, 2, 3, 5, 8, 13, 21, None]),
            "seed": self.random.getrandbits(64),
            "logprobs": pick([None, None, None, 2]),
        }
        kind = self.random.random()
        if kind < 0.12:
            beams = {"n": pick([1, 2]), "best_of": pick([2, 3]), "use_beam_search": True}
            return SamplingParams(**{**common, "logprobs": None, "temperature": 0, **beams})
        if kind < 0.3:
            n = pick([2, 3])
            best_of = pick([None, None, 3])
            return SamplingParams(**common, temperature=1.1, n=n, best_of=best_of)
        return SamplingParams(
            **common,
            temperature=pick([0, 0, 0.9]),
            top_k=pick([0, 0, 5]),
            repetition_penalty=pick([1.0, 1.0, 1.3]),
            no_repeat_ngram_size=pick([0, 0, 0, 2]),
            min_tokens=pick([0, 0, 1]),
            prompt_logprobs=pick([None, None, None, None, 0, 1]),
        )

    def options(self) -> RequestOptions:
        pick = self.random.choice
        return RequestOptions(
            priority=pick([0, 0, 0, -1, 5]),
            timeout=pick([None] * 20 + [1e-6, 0.01]),
            cache_salt=pick([None, None, None, "mine"]),
            cache_priority=pick([0, 0, 50]),
            pooling=pick([None] * 12 + ["mean", "last", "cls"]),
            normalize=False,
        )

    def send(self) -> None:
        prompt = [*self.random.choice(self.prefixes), *self._tokens(self.random.randint(1, 12))]
        sent = Sent(prompt[:55], self.params(), self.options())
        if sent.options.pooling:
            sent.params = SamplingParams()
        name = str(len(self.sent))
        try:
            self.executor.add_request(NewRequest(name, sent.prompt, sent.params, sent.options))
        except RequestError as error:
            assert "may grow to" in str(error) or "sequences" in str(error)  # noqa: PT017
            return
        self.sent[name] = sent
        self.open.add(name)

    def act(self) -> None:
        """Something that may happen between two steps."""
        executor, kind = self.executor, self.random.random()
        if kind < 0.35 and len(self.open) < 25:
            for _ in range(self.random.choice([1, 1, 2, 6])):
                self.send()
        elif kind < 0.42 and self.open:
            name = self.random.choice(sorted(self.open))
            self.sent[name].aborted = executor.abort(name)
            assert self.sent[name].aborted
            self.open.remove(name)
        elif kind < 0.47 and executor.scheduler.running:
            executor.scheduler.preempt(self.random.choice(executor.scheduler.running))
        elif kind < 0.5:
            self.failing = self.random.choice(PHASES)
        elif kind < 0.51:
            executor.reset_prefix_cache()
        elif kind < 0.54:
            prefix = self.random.choice(self.prefixes)
            self.random.choice([executor.pin_prefix, executor.unpin_prefix])(prefix)

    def step(self) -> None:
        for output in self.executor.step():
            sent = self.sent[output.request_id]
            assert not sent.aborted, "an aborted request is answered"
            assert output.request_id in self.open, "a request is answered twice"
            mine = sent.outputs[output.index]
            ended = bool(mine) and mine[-1].finished
            assert output.error is not None or not ended, "a sequence is answered twice"
            mine.append(output)
            if sent.is_answered:
                self.open.remove(output.request_id)

    def check(self, sent: Sent) -> str:
        """Compare with the request by itself; returns how it ended."""
        outputs = [output for mine in sent.outputs.values() for output in mine]
        errors = [output.error for output in outputs if output.error is not None]
        assert all(isinstance(error, OutOfLuckError | RequestError) for error in errors), errors
        cut = sent.aborted or bool(errors) or any(o.finish_reason == "timeout" for o in outputs)
        if sent.options.pooling:
            if not cut:
                (last,) = outputs
                assert last.embedding == pytest.approx(pooled_alone(sent), rel=1e-6)
            return "embedded"
        if sent.params.use_beam_search:
            if not cut:
                found = [sent.outputs[index][0] for index in range(sent.params.n)]
                assert [one.token_ids for one in found] == beams_alone(self.model, sent)
            return "beams"
        for index in range(sent.params.num_sequences):
            seed = (sent.params.seed + index) % 2**64  # type: ignore[operator]
            params = replace(sent.params, seed=seed, n=1, best_of=None)
            alone, reason = generate_alone(self.model, sent.prompt, params, LIMITS.max_seq_len)
            mine = sent.outputs[index]
            tokens = [token for output in mine for token in output.token_ids]
            if cut:
                assert tokens == alone[: len(tokens)]
                if errors and isinstance(errors[0], RequestError):
                    assert reason == "error" or sent.params.num_sequences > 1
            else:
                assert (tokens, mine[-1].finish_reason) == (alone, reason)
                if sent.params.prompt_logprobs is not None:
                    places = [place for output in mine for place in output.prompt_logprobs]
                    assert places[0] is None
                    pairs = zip(sent.prompt[1:], places[1:], strict=True)
                    assert all(token in place for token, place in pairs)
        return "error" if errors else "cut" if cut else "whole"


def pooled_alone(sent: Sent) -> list[float]:
    """The fake model's hidden states are (token, position)."""
    rows = torch.tensor([(t, p) for p, t in enumerate(sent.prompt)]).float()
    pooled = {"mean": rows.mean(0), "cls": rows[0], "last": rows[-1]}
    return pooled[sent.options.pooling or ""].tolist()


def beams_alone(model: FakeModel, sent: Sent) -> list[tuple[int, ...]]:
    most = LIMITS.max_seq_len
    if sent.params.max_tokens is not None:
        most = min(most, len(sent.prompt) + sent.params.max_tokens)
    search = BeamSearch(sent.params, sent.prompt, frozenset([EOS]), frozenset(), most)
    histories = [list(sent.prompt)]
    while True:
        logits = torch.stack([history_logits(model, history) for history in histories])
        choices = search.advance(logits.log_softmax(-1))
        if choices is None:
            return [one.token_ids for one in search.hypotheses()]
        histories = [[*histories[parent], token] for parent, token in choices]


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"enable_prefix_caching": False},
    "cached": {},
    "tiny pool": {"kv_cache_tokens": 80, "max_num_seqs": 4},
    "evicting": {"scheduler_policy": "max_utilization", "kv_cache_tokens": 88},
    "host": {"kv_cache_tokens": 120, "host_cache_memory": 32 * 4 * 60},
    "overlap": {"overlap": True},
    "overlap evicting": {
        "overlap": True,
        "scheduler_policy": "max_utilization",
        "kv_cache_tokens": 120,
        "host_cache_memory": 32 * 4 * 20,
    },
    "overlap bucketed": {"overlap": True, "cuda_graphs": True, "max_num_tokens": 9},
}


SLOW = ("plain", "cached", "evicting", "overlap")
"""The others have each of these's parts too."""


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in CONFIGS]
)
def test_random_traffic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = list(CONFIGS).index(name)
    device = SlowDevice(seed) if "overlap" in name else None
    traffic = Traffic(seed, device, **CONFIGS[name])
    executor = traffic.executor
    executor.sampling.launch = failing(traffic, "sample", executor.sampling.launch)  # type: ignore[method-assign]
    executor.sampling.read = failing(traffic, "read", executor.sampling.read)  # type: ignore[method-assign]
    executor._accept = failing(traffic, "output", executor._accept)  # type: ignore[method-assign]
    traffic.model.before_forward = lambda number: traffic.maybe_fail("run")
    prepare = failing(traffic, "prepare", executor_module.prepare)
    monkeypatch.setattr(executor_module, "prepare", prepare)
    for _ in range(STEPS):
        traffic.act()
        traffic.step()
    traffic.failing = None
    for _ in range(2000):
        if not executor.has_unfinished:
            break
        traffic.step()
    assert not traffic.open, "requests were lost"
    executor.reset_prefix_cache()
    assert_nothing_held(executor)
    ends = [traffic.check(sent) for sent in traffic.sent.values()]
    counts = {end: ends.count(end) for end in set(ends)}
    assert min(counts[end] for end in ("whole", "cut", "error", "beams", "embedded")) > 5, counts
    assert traffic.num_failures > 10
    stats = executor.get_stats()
    if name != "plain":
        assert stats["num_cached_tokens"] > 100
    if "bucketed" in name:
        assert min(stats["num_graph_steps"], stats["num_piecewise_steps"]) > 100
    if "evicting" in name:
        assert stats["num_preemptions"] > 10
    executor.shutdown()


def failing(traffic: Traffic, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def maybe(*args: Any, **kwargs: Any) -> Any:
        traffic.maybe_fail(phase)
        return call(*args, **kwargs)

    return maybe
