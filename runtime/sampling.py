"""From a step's logits to its tokens, in two halves that overlap with the next step's.

`plan` runs on the host and looks at requests and their tokens; `launch` puts the device to work,
in the order of the calls, with the plan and device tensors alone, so that it may run in another
thread while the next step is planned; `read` waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch

from inlay.errors import RequestError
from inlay.runtime.logits import Edits, LogitsProcessor, SlotEdits
from inlay.runtime.logprobs import TopTokens, find_top_tokens, read_top_tokens
from inlay.runtime.outputs import Logprob
from inlay.runtime.processors import (
    BatchedProcessors,
    can_be_sampled,
    checked_call,
    failure,
    make_processors,
)
from inlay.runtime.request import Request
from inlay.runtime.sampler import NO_TOKEN, Draws, Sampler, SlotValues, to_device
from inlay.runtime.sampling_params import Processor


@dataclass(frozen=True)
class SampledToken:
    """One row's token.

    token_id: NO_TOKEN where there was none to choose from, or `error` says why.
    logprob: natural logarithm of its probability, for requests that ask for logprobs or are ranked
        by their probability (best_of > n). logprobs: what the request asked for.
    """

    token_id: int
    logprob: float | None = None
    logprobs: dict[int, Logprob] | None = None
    error: RequestError | None = None


@dataclass(frozen=True)
class _OwnCall:
    """A row's own processor, and the tokens it is called with."""

    row: int
    name: str
    processor: Processor
    prompt: list[int]
    output: list[int]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """[vocab] -> [vocab]; raises whatever it raises."""
        return self.processor(self.prompt, self.output, logits)


@dataclass(frozen=True)
class SamplingPlan:
    """A step's sampling, as far as the host has to know: nothing in it changes afterwards.

    requests: of each row. logits_rows: int64 [N], where its logits are.
    logprob_rows: rows whose probability is asked for; logprob_counts: with how many others.
    """

    requests: tuple[Request, ...]
    logits_rows: np.ndarray
    new_values: SlotValues
    new_edits: list[SlotEdits]
    draws: Draws
    edits: Edits
    own_calls: list[_OwnCall]
    errors: dict[int, RequestError]
    logprob_rows: list[int]
    logprob_counts: list[int]

    @property
    def is_plain(self) -> bool:
        """Whether row i is sampled from logits i as they are, by the sampler's kernel."""
        count = len(self.requests)
        return (
            count > 0
            and self.edits.is_empty
            and not self.own_calls
            and not self.draws.is_typical
            and np.array_equal(self.logits_rows, np.arange(count))
        )


@dataclass
class Sampled:
    """What was launched: on its way to the host until `ready`, which is None on a CPU, and behind
    all that the device was given before.

    sound: after a processor, by its name, which of some rows could still be sampled from.
    """

    plan: SamplingPlan
    tokens: torch.Tensor
    top: TopTokens | None = None
    errors: dict[int, RequestError] = field(default_factory=dict)
    sound: list[tuple[str, list[int], torch.Tensor]] = field(default_factory=list)
    ready: torch.cuda.Event | None = None


class SamplingStage:
    """All state of sampling, by slot."""

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        processors: Sequence[str] = (),
    ) -> None:
        """processors: the engine's own, "module:Class" or "module:Class:{JSON arguments}".

        They are kept as `batched`, for a beam search to use too. OptionError where one cannot be
        made.
        """
        self._device = device
        self.sampler = Sampler(max_num_seqs, device)
        self._logits_processor = LogitsProcessor(max_num_seqs, vocab_size, device)
        self.batched = BatchedProcessors.make(processors, vocab_size, device)
        # Of the host. A sequence keeps its processors where it is preempted.
        self._own: WeakKeyDictionary[Request, tuple[tuple[str, Processor], ...] | RequestError]
        self._own = WeakKeyDictionary()

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 [slots] on the device: the token sampled last in each slot."""
        return self.sampler.last_tokens

    @property
    def needs_history(self) -> bool:
        """Whether every step has to wait for the one before: the engine's processors see tokens."""
        return bool(self.batched.members)

    def plan(
        self, rows: Sequence[tuple[Request, int]], new: Sequence[Request] = ()
    ) -> SamplingPlan:
        """Look at what is sampled next; on the host alone.

        rows: requests and the row of the logits that each is sampled from, which several may share.
        new: requests whose slots are set up first.
        """
        values = self.sampler.plan_slots([(r.slot, r.params, r.seed) for r in new])
        slot_edits = [self._logits_processor.plan_slot(r.slot, r) for r in new]
        requests = tuple(request for request, _ in rows)
        slots = np.array([request.slot for request in requests], dtype=np.int64)
        positions = np.array([len(request.token_ids) for request in requests], dtype=np.int64)
        own_calls, errors = self._plan_own(requests)
        counts = {
            row: request.params.logprobs or 0
            for row, request in enumerate(requests)
            if request.params.logprobs is not None or request.params.needs_cumulative_logprob
        }
        return SamplingPlan(
            requests=requests,
            logits_rows=np.array([row for _, row in rows], dtype=np.int64),
            new_values=values,
            new_edits=slot_edits,
            draws=self.sampler.plan(slots, positions),
            edits=self._logits_processor.plan(slots),
            own_calls=own_calls,
            errors=errors,
            logprob_rows=list(counts),
            logprob_counts=list(counts.values()),
        )

    def _plan_own(
        self, requests: Sequence[Request]
    ) -> tuple[list[_OwnCall], dict[int, RequestError]]:
        calls, errors = [], {}
        for row, request in enumerate(requests):
            if not request.params.logits_processors:
                continue
            if request not in self._own:
                try:
                    self._own[request] = make_processors(request.params)
                except RequestError as error:
                    self._own[request] = error
            own, start = self._own[request], request.num_prompt_tokens
            if isinstance(own, RequestError):
                errors[row] = own
                continue
            prompt, output = request.token_ids[:start], request.token_ids[start:]
            # Lists of their own: the next processor is not to see what the last did to them.
            calls += [_OwnCall(row, name, call, [*prompt], [*output]) for name, call in own]
        return calls, errors

    def begin(self, plan: SamplingPlan) -> None:
        """Set up a plan's new slots: `launch` does, but a graph may sample before it is called."""
        self.sampler.launch_slots(plan.new_values)

    def launch(
        self, plan: SamplingPlan, logits: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> Sampled:
        """Start the device on a plan. logits: [rows, vocab], any float dtype, left as they are.

        tokens: of a plain plan, where the sampler was launched with the model: int64 [>= rows].
        Exceptions of the user's processors become the `error` of their requests' tokens.
        """
        if tokens is None:
            self.begin(plan)
        self._logits_processor.launch_slots(plan.new_edits)
        count = len(plan.requests)
        if not count:
            return self._send(Sampled(plan, torch.empty(0)), torch.empty(0, dtype=torch.int64))
        if np.array_equal(plan.logits_rows, np.arange(count)):
            logits = logits[:count]
        else:
            logits = logits[to_device(plan.logits_rows, self._device)]
        sampled = Sampled(plan, torch.empty(0), errors=dict(plan.errors))
        if tokens is None:
            processed = self._logits_processor.launch(plan.edits, logits)
            if self.batched.members or plan.own_calls:
                processed = self._call_processors(plan, processed.float(), sampled)
            tokens = self.sampler.launch(plan.draws, processed)
        tokens = tokens[:count]
        self._logits_processor.launch_observe(plan.edits, tokens)
        if plan.logprob_rows:
            rows = to_device(np.array(plan.logprob_rows, dtype=np.int64), self._device)
            chosen, width = tokens[rows].clamp_min(0), max(plan.logprob_counts)
            sampled.top = find_top_tokens(logits[rows], chosen, width)
        return self._send(sampled, tokens)

    def _call_processors(
        self, plan: SamplingPlan, logits: torch.Tensor, sampled: Sampled
    ) -> torch.Tensor:
        """The engine's processors, then the requests' own; what goes wrong is noted in sampled."""
        rows = list(range(len(plan.requests)))
        try:
            logits, sound = self.batched.apply(logits, plan.requests)
            sampled.sound += [(name, rows, good) for name, good in sound]
        except RequestError as error:
            sampled.errors.update({row: sampled.errors.get(row, error) for row in rows})
            return logits
        if plan.own_calls:
            logits = logits.clone()
        for call in plan.own_calls:
            if call.row in sampled.errors:
                continue
            before = logits[call.row]
            try:
                after = checked_call(call.name, call, before)
            except RequestError as error:
                sampled.errors[call.row] = error
                continue
            good = can_be_sampled(after) | ~can_be_sampled(before)
            sampled.sound.append((call.name, [call.row], good[None]))
            logits[call.row] = after
        return logits

    def _send(self, sampled: Sampled, tokens: torch.Tensor) -> Sampled:
        """Start the way to the host."""
        sampled.tokens = tokens.to("cpu", non_blocking=True)
        sampled.top = sampled.top and sampled.top.to_host()
        sampled.sound = [
            (name, rows, good.to("cpu", non_blocking=True)) for name, rows, good in sampled.sound
        ]
        if self._device.type == "cuda":
            sampled.ready = torch.cuda.Event()
            sampled.ready.record()
        return sampled

    def read(self, sampled: Sampled) -> list[SampledToken]:
        """Wait for the device; one for each row of the plan."""
        if sampled.ready is not None:
            sampled.ready.synchronize()
        plan, errors = sampled.plan, sampled.errors
        for name, rows, good in sampled.sound:
            for row, is_good in zip(rows, good.tolist(), strict=True):
                if not is_good and row not in errors:
                    errors[row] = failure(
                        name, "gave logits that are NaN, +inf, or -inf all of them"
                    )
        found: dict[int, dict[int, Logprob]] = {}
        if sampled.top is not None:
            places = read_top_tokens(sampled.top, plan.logprob_counts)
            found = dict(zip(plan.logprob_rows, places, strict=True))
        return [
            self._token(request, token, found.get(row), errors.get(row))
            for row, (request, token) in enumerate(
                zip(plan.requests, sampled.tokens.tolist(), strict=True)
            )
        ]

    def _token(
        self,
        request: Request,
        token: int,
        places: dict[int, Logprob] | None,
        error: RequestError | None,
    ) -> SampledToken:
        if error is not None or token == NO_TOKEN:
            return SampledToken(NO_TOKEN, error=error)
        logprob = None if places is None else places[token].logprob
        return SampledToken(token, logprob, None if request.params.logprobs is None else places)
