"""The loop that every backend shares: schedule, prepare, launch, read, hand out.

With overlap a step is launched before the results of the one before it are read: what the host does
then costs the device no time. Whatever touches a tensor is in `_run`, which the launcher calls in
order and perhaps elsewhere; whatever touches a request is outside of it.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from inlay.backends.base import LoadedModel
from inlay.backends.device import needing_memory
from inlay.backends.static_call import no_collection
from inlay.backends.step import SMALLEST
from inlay.errors import InlayError, RequestError
from inlay.runtime.admission import Admission
from inlay.runtime.batch import MAX_PROMPT_LOGITS, StepSizes, prepare
from inlay.runtime.beams import Beams
from inlay.runtime.block_copies import BlockCopier
from inlay.runtime.block_tables import BlockCopy
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.dispatch import Dispatcher
from inlay.runtime.executor_control import ExecutorControl
from inlay.runtime.in_flight import Launched, Row
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.launcher import InlineLauncher, Launcher
from inlay.runtime.memory import num_host_blocks, num_kv_blocks
from inlay.runtime.outputs import StepOutput
from inlay.runtime.pooling import Pooler
from inlay.runtime.prompt_logprobs import PromptLogprobs
from inlay.runtime.request import UNKNOWN_TOKEN, NewRequest, Request, make_sequences
from inlay.runtime.sampler import NO_TOKEN
from inlay.runtime.sampling import SampledToken, SamplingStage
from inlay.runtime.scheduler import Schedule, ScheduledRequest, Scheduler
from inlay.runtime.stats import Stats
from inlay.runtime.step_runner import Result, StepRunner, Work


class Executor(ExecutorControl):
    """Runs requests on a model, step by step; tokens in, tokens out.

    Text is not its business: stop strings and detokenization are the caller's, who aborts a
    request when its text is complete. Not thread-safe.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: ExecutorConfig | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        """Allocate the KV cache; OptionError where config asks for more than the model has.

        launcher: runs the device's part of each step; None runs it inline.
        """
        self.config = config = config or ExecutorConfig()
        self.model = model
        self.limits = limits = config.narrow(model.limits)
        self.stats = Stats.logging_to(config.iteration_log)
        self._launcher = launcher or InlineLauncher()
        on_cuda = model.device.type == "cuda"
        self._depth = int(on_cuda if config.overlap is None else config.overlap)
        self.sampling = SamplingStage(
            limits.max_num_seqs, limits.vocab_size, model.device, config.logits_processors
        )
        graphs = on_cuda if config.cuda_graphs is None else config.cuda_graphs
        graphs = graphs and not model.is_encoder  # which does not decode
        with no_collection() if on_cuda else nullcontext():
            self._allocate(graphs)
        self._depth = 0 if self.sampling.needs_history else self._depth
        copier = BlockCopier(model, [host.num_blocks for host in self.kv_cache.hosts])
        self._runner = StepRunner(model, self.dispatcher, copier, self.sampling)
        self.scheduler = Scheduler(
            self.kv_cache,
            limits,
            max_logits=max(limits.max_num_seqs, MAX_PROMPT_LOGITS),
            policy=config.scheduler_policy,
            prefix_caching=config.enable_prefix_caching and not model.is_encoder,
            whole_prompts=model.is_encoder,
        )
        self._sizes = StepSizes.within(limits, SMALLEST if graphs and on_cuda else 1)
        self._sequences: dict[str, list[Request]] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._in_flight: deque[Launched] = deque()
        self._undelivered: list[StepOutput] = []
        self._num_requests = 0

    def _allocate(self, graphs: bool) -> None:
        """The KV pool, after what weights, steps and graphs take was measured with a pool of next
        to nothing; then the graphs over that pool."""
        model, limits, config = self.model, self.limits, self.config
        if config.batch_invariant:
            model.make_batch_invariant()
        groups = model.kv_groups_for(config.kv_cache_dtype)
        self.dispatcher = Dispatcher(model, limits, self.sampling.sampler)
        taken = 0
        if model.device.type == "cuda":
            model.allocate_kv_cache(1, config.kv_cache_dtype)
            if graphs:
                taken = self.dispatcher.capture()
            taken += self.dispatcher.warm_up(max(limits.max_num_seqs, MAX_PROMPT_LOGITS))
            self.dispatcher.drop()
        sizes = num_kv_blocks(config, limits, groups, model.device, taken)
        host_sizes = num_host_blocks(config, groups)
        with needing_memory("the KV cache", "lower kv_cache_tokens or kv_cache_free_fraction"):
            model.allocate_kv_cache(sizes, config.kv_cache_dtype)
        if graphs:
            self.dispatcher.capture()
        self.kv_cache = KVCache(
            sizes,
            [group.window for group in groups],
            limits.block_size,
            limits.max_num_seqs,
            limits.max_seq_len,
            num_host_blocks=host_sizes,
            events=config.kv_events,
        )
        self.admission = Admission(
            limits, self.kv_cache.windows, tuple(sizes), is_encoder=model.is_encoder
        )

    @property
    def has_unfinished(self) -> bool:
        """Whether step() has anything left to run or to report."""
        return self.scheduler.has_unfinished or bool(self._in_flight or self._undelivered)

    def add_request(self, request: NewRequest) -> None:
        """Queue a request; RequestError, and nothing queued, where it cannot run."""
        name = request.request_id
        if name in self._sequences:
            raise RequestError(f"request id {name!r} is in use; give another one")
        token_ids = self.admission.check(request.token_ids, request.params, request.options)
        self._num_requests += 1
        family = make_sequences(
            request,
            token_ids,
            order=self._num_requests,
            seed=secrets.randbits(64) if request.params.seed is None else request.params.seed,
            eos_token_ids=self.config.eos_token_ids,
            padding_token=self.limits.padding_token,
            max_total_tokens=self.admission.max_total_tokens(
                len(token_ids), request.params, request.options
            ),
        )
        if request.params.use_beam_search:
            beams = Beams(list(family), self.sampling.batched)
            for one in family:
                one.beams = beams
        self._sequences[name] = family
        if request.options.timeout is not None:
            if len(self._deadlines) > 2 * len(self._sequences) + 100:  # most have ended
                known = {one[0].order for one in self._sequences.values()}
                self._deadlines = [entry for entry in self._deadlines if entry[1] in known]
                heapq.heapify(self._deadlines)
            deadline = request.arrival_time + request.options.timeout
            heapq.heappush(self._deadlines, (deadline, family[0].order, name))
        self.stats.counters.num_prompt_tokens += len(token_ids)
        self.scheduler.add(family[0])

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """End a request, or one of its sequences, in any state; False if it is not here (any more).

        Of a beam search, whose sequences are known at its end, none ends alone. Blocks are free at
        once: what is under way on the device comes before their next use.
        """
        family = self._sequences.get(request_id, [])
        chosen = [one for one in family if index is None or one.index == index]
        if index is not None and chosen and chosen[0].beams is not None:
            return False
        for request in chosen:
            if index is not None and family[0].siblings:
                self.scheduler.part(family[0], request)
            self._end(request)
        return bool(chosen)

    def step(self) -> list[StepOutput]:
        """Run one step; what it gave each sequence that got a token, finished or failed.

        An exception on the way ends the requests of that step and is in their outputs' `error`. One
        that is no Exception (KeyboardInterrupt) is raised, and the outputs come with the next step.
        """
        outputs, self._undelivered = self._undelivered, []
        outputs += self._expire()
        try:
            launched = self._launch(outputs)
            while len(self._in_flight) > (self._depth if launched else 0):
                outputs += self._collect(self._in_flight.popleft())
        except BaseException:
            self._undelivered = [*outputs, *self._undelivered]
            raise
        if self.config.debug:
            self.scheduler.check()
        return outputs

    def shutdown(self) -> None:
        """End everything that is under way."""
        for name in list(self._sequences):
            self.abort(name)
        while self._in_flight:
            self._collect(self._in_flight.popleft())
        self._launcher.close()
        self.dispatcher.drop()  # graphs know their dispatcher and the model, whose memory is due
        self.stats.close()

    # A step, in order.

    def _launch(self, outputs: list[StepOutput]) -> bool:
        """Schedule, prepare and launch a step; False where there is nothing to run."""
        begin = time.perf_counter()
        with self.stats.phase("schedule"):
            schedule = self.scheduler.schedule()
        self.stats.counters.num_preemptions += schedule.num_preempted
        if not schedule.items:
            return False  # copies that are due wait for the next step that runs
        copies = self.kv_cache.take_copies()
        try:
            with self.stats.phase("prepare"):
                rows, beams, work = self._prepare(schedule, copies)
            with self.stats.phase("launch"):
                pending = self._launcher.launch(lambda: self._runner.run(work))
        except BaseException as error:
            outputs += self._fail(schedule.items, copies, error)
            if not isinstance(error, Exception):
                raise
            return False
        self.stats.counters.num_block_copies += len(copies)
        self._account(schedule, rows)
        self._in_flight.append(Launched(schedule.items, rows, beams, work, pending, begin))
        return True

    def _prepare(
        self, schedule: Schedule, copies: Sequence[BlockCopy]
    ) -> tuple[list[Row], list[tuple[Beams, list[Row]]], Work]:
        batch = prepare(schedule.items, self.kv_cache, self._sizes)
        rows: list[tuple[Request, int]] = []
        new = list(schedule.admitted)
        searches: dict[Beams, list[tuple[Request, int]]] = {}
        for item, row in zip(schedule.items, batch.rows, strict=True):
            request = item.request
            if not item.needs_logits or request.options.pooling is not None:
                continue
            if request.beams is not None:
                searches.setdefault(request.beams, []).append((request, row))
                continue
            rows += [(one, row) for one in (request, *request.siblings)]
            new += request.siblings
        now = time.perf_counter()
        for request in schedule.admitted:
            if request.scheduled_time is None:
                request.scheduled_time = now
                self.stats.counters.num_cached_tokens += request.num_cached_tokens
        work = Work(
            batch,
            copies,
            self.sampling.plan(rows, new),
            [row for pairs in searches.values() for _, row in pairs],
            PromptLogprobs.of(schedule.items, batch.rows),
            Pooler.of(schedule.items, batch.step),
        )
        beams = [
            (group, [Row(request, request.epoch) for request, _ in pairs])
            for group, pairs in searches.items()
        ]
        return [Row(request, request.epoch) for request, _ in rows], beams, work

    def _account(self, schedule: Schedule, rows: list[Row]) -> None:
        """What was launched counts as done for the next step's schedule."""
        counters = self.stats.counters
        for item in schedule.items:
            request = item.request
            is_decode = item.num_tokens == 1 and item.start >= request.num_prompt_tokens
            counters.num_decode_tokens += is_decode
            counters.num_prefill_tokens += 0 if is_decode else item.num_tokens
            request.num_computed_tokens = item.end
            if item.needs_logits and request.options.pooling is None:
                request.token_ids.append(UNKNOWN_TOKEN)
                request.num_pending += 1
                if request.siblings and request.beams is None:
                    self.scheduler.fork(request)

    def _collect(self, launched: Launched) -> list[StepOutput]:
        """Wait for a step's results and account for them; ends sequences that are complete."""
        outputs: list[StepOutput] = []
        try:
            with self.stats.phase("wait"):
                result = launched.pending.result()
                tokens = self.sampling.read(result.sampled)
            with self.stats.phase("output"):
                for item in launched.items:
                    if item.is_current:
                        self.scheduler.commit(item.request, item.end)
                outputs += self._prompt_outputs(launched, result)
                for row, token in zip(launched.rows, tokens, strict=True):
                    if row.is_current:
                        outputs += self._accept(row.request, token)
                outputs += self._advance_beams(launched, result)
        except BaseException as error:
            parts: list[ScheduledRequest | Row] = [*launched.items, *launched.rows]
            outputs += self._fail(parts, launched.work.copies, error)
            if not isinstance(error, Exception):
                self._undelivered += outputs
                raise
        self.stats.step(launched.begin, self._facts(launched))
        return outputs

    def _prompt_outputs(self, launched: Launched, result: Result) -> list[StepOutput]:
        """Log probabilities of prompts, and embeddings."""
        outputs = []
        for item, found in launched.work.prompt_logprobs.read(result.prompt_logprobs):
            if item.is_current:
                outputs.append(self._output(item.request, prompt_logprobs=found))
        for item, embedding in launched.work.pooler.read(result.pooled):
            if item.is_current:
                self._end(item.request)
                output = self._output(item.request, embedding=embedding, finish_reason="stop")
                outputs.append(output)
        return outputs

    def _accept(self, request: Request, token: SampledToken) -> list[StepOutput]:
        """Take a sequence's next token."""
        if token.token_id == NO_TOKEN:
            return self._fail_request(request.request_id, token.error or _no_token(request))
        reason, stop_reason = request.accept(token.token_id)
        request.cumulative_logprob += token.logprob or 0.0
        self.stats.counters.num_sampled_tokens += 1
        output = self._output(
            request,
            token_ids=(token.token_id,),
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=() if token.logprobs is None else (token.logprobs,),
            cumulative_logprob=None if token.logprob is None else request.cumulative_logprob,
        )
        if reason is not None:
            self._end(request)
        return [output]

    def _advance_beams(self, launched: Launched, result: Result) -> list[StepOutput]:
        """Let each search choose its next beams; a search that ends gives all of its outputs."""
        outputs, start = [], 0
        for beams, rows in launched.beams:
            start, begin = start + len(rows), start
            if not all(row.is_current for row in rows):
                continue
            assert result.scores is not None
            family = beams.family
            try:
                found = beams.advance(result.scores[begin:start], self.scheduler)
            except RequestError as error:
                outputs += self._fail_request(family[0].request_id, error)
                continue
            if found is not None:
                for request in family:
                    self._end(request)
            outputs += [
                self._output(
                    family[index],
                    token_ids=tuple(one.token_ids),
                    finish_reason=one.finish_reason,
                    stop_reason=one.stop_reason,
                    cumulative_logprob=one.cumulative_logprob,
                )
                for index, one in enumerate(found or ())
            ]
        return outputs

    # Ends.

    def _output(self, request: Request, **fields: Any) -> StepOutput:
        """An output of a sequence; its first one says when it came in, and with what cached."""
        if not request.was_heard_of:
            request.was_heard_of = True
            fields["num_cached_tokens"] = request.num_cached_tokens
            fields["scheduled_time"] = request.scheduled_time
        return StepOutput(request.request_id, index=request.index, **fields)

    def _end(self, request: Request) -> None:
        """A sequence is over: what it holds is free."""
        self.scheduler.finish(request)
        family = self._sequences[request.request_id]
        family.remove(request)
        if not family:
            del self._sequences[request.request_id]
            self.stats.counters.num_finished += 1

    def _fail_request(self, request_id: str, error: BaseException) -> list[StepOutput]:
        """End a request with an error, which comes with its first sequence that has not ended."""
        family = self._sequences.get(request_id)
        if not family:
            return []
        index = family[0].index
        self.abort(request_id)
        self.stats.counters.num_failed += 1
        return [StepOutput(request_id, finish_reason="error", error=error, index=index)]

    def _fail(
        self,
        items: Sequence[ScheduledRequest | Row],
        copies: Sequence[BlockCopy],
        error: BaseException,
    ) -> list[StepOutput]:
        """End all requests of a step that went wrong.

        Its copies may not have been made. Requests of a later step may have been launched upon
        them, or upon copies of what they should have brought; those are computed again.
        """
        self.kv_cache.discard(copies)
        names = dict.fromkeys(item.request.request_id for item in items if item.is_current)
        outputs = [output for name in names for output in self._fail_request(name, error)]
        if any(copy.kind != "fork" for copy in copies):
            for launched in self._in_flight:
                self.kv_cache.discard(launched.work.copies)
                for item in launched.items:
                    if item.is_current:
                        self.scheduler.preempt(item.request)
        return outputs

    def _expire(self) -> list[StepOutput]:
        """End requests whose time is up."""
        outputs, now = [], time.perf_counter()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, name = heapq.heappop(self._deadlines)
            for request in list(self._sequences.get(name, ())):
                if request.order != order:  # another one, which has the id by now
                    continue
                self._end(request)
                if request.beams is None or request.index < request.params.n:
                    outputs.append(self._output(request, finish_reason="timeout"))
        return outputs

    def _facts(self, launched: Launched) -> dict[str, Any]:
        return {
            "num_requests": len(launched.items),
            "num_tokens": sum(item.num_tokens for item in launched.items),
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_used_blocks": self.kv_cache.num_used_blocks,
        }


def _no_token(request: Request) -> InlayError:
    return RequestError(
        f"request {request.request_id!r} has no token to choose from after "
        f"{request.num_known_tokens}: its logits are NaN, or allowed_token_ids, bad_words, "
        "no_repeat_ngram_size and min_tokens together leave none; loosen those"
    )
