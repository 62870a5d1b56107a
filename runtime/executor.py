"""The loop that every backend shares: schedule, prepare, run, sample, hand out."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from inlay.backends.base import LoadedModel
from inlay.errors import RequestError
from inlay.runtime.batch import Batch, StepSizes, prepare
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.kv_cache import KVCache
from inlay.runtime.logits import LogitsProcessor
from inlay.runtime.logprobs import top_logprobs
from inlay.runtime.memory import num_kv_blocks
from inlay.runtime.outputs import Logprob, StepOutput
from inlay.runtime.request import Request, RequestState, check_prompt, check_vocabulary
from inlay.runtime.sampler import NO_TOKEN, Sampler
from inlay.runtime.sampling_params import SamplingParams
from inlay.runtime.scheduler import ScheduledRequest, Scheduler


class Executor:
    """Runs requests on a model, step by step; tokens in, tokens out.

    Text is not its business: stop strings and detokenization are the caller's, who aborts a
    request when its text is complete. Not thread-safe.
    """

    def __init__(self, model: LoadedModel, config: ExecutorConfig | None = None) -> None:
        """Allocate the KV cache; OptionError where config asks for more than the model has."""
        self.config = config or ExecutorConfig()
        self.model = model
        self.limits = self.config.narrow(model.limits)
        num_blocks = num_kv_blocks(self.config, self.limits, model.kv_groups, model.device)
        model.allocate_kv_cache(num_blocks)
        max_num_seqs, max_seq_len = self.limits.max_num_seqs, self.limits.max_seq_len
        self.kv_cache = KVCache(
            len(model.kv_groups), num_blocks, self.limits.block_size, max_num_seqs, max_seq_len
        )
        self.scheduler = Scheduler(self.kv_cache, max_num_seqs, self.limits.max_num_tokens)
        self.logits_processor = LogitsProcessor(max_num_seqs, self.limits.vocab_size, model.device)
        self.sampler = Sampler(max_num_seqs, model.device)
        self._sizes = StepSizes.within(self.limits)
        self._requests: dict[str, Request] = {}
        self._undelivered: list[StepOutput] = []

    @property
    def has_unfinished(self) -> bool:
        """Whether step() has anything left to run or to report."""
        return self.scheduler.has_unfinished or bool(self._undelivered)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt as ints; RequestError, naming the fault, where the request cannot run."""
        limits = self.limits
        token_ids = check_prompt(prompt_token_ids, limits.vocab_size, limits.max_seq_len)
        limits.refuse_padding(token_ids)
        for name, ids in params.named_token_ids.items():
            check_vocabulary(name, ids, limits.vocab_size)
        if params.bad_words:
            raise RequestError(
                f"bad_words are text and must be token ids here, given {params.bad_words!r}: give "
                "bad_words_ids, or use LLM, which has a tokenizer"
            )
        total = self._max_total_tokens(len(token_ids), params)
        needed = self.kv_cache.num_blocks_for(total)
        if needed > self.kv_cache.num_blocks:
            raise RequestError(
                f"the request may grow to {total} tokens ({len(token_ids)} of prompt), {needed}"
                f" blocks of the KV cache, which has {self.kv_cache.num_blocks} blocks"
                f" ({self.kv_cache.num_blocks * limits.block_size} tokens): lower max_tokens, or"
                " raise kv_cache_tokens or kv_cache_memory"
            )
        return token_ids

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | None = None,
    ) -> None:
        """Queue a request; RequestError, and nothing queued, where it cannot run."""
        params = params or SamplingParams()
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use; give another one")
        token_ids = self.check_request(prompt_token_ids, params)
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else int(params.seed),
            stop_token_ids=self._stop_token_ids(params),
            eos_token_ids=frozenset(() if params.ignore_eos else self.config.eos_token_ids),
            max_total_tokens=self._max_total_tokens(len(token_ids), params),
        )
        self._requests[request_id] = request
        self.scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request in any state and free its blocks; False if it is not (or no more) here."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.scheduler.finish(request)
        return request is not None

    def step(self) -> list[StepOutput]:
        """Run one step; what it gave each request that got a token, finished or failed.

        An exception of the model ends the step's requests and is in their outputs' `error`. One
        that is no Exception (KeyboardInterrupt) is raised, and the outputs come with the next step.
        """
        outputs, self._undelivered = self._undelivered, []
        scheduled = self._schedule()
        if scheduled:
            try:
                batch = prepare(scheduled, self.kv_cache, self.sampler.last_tokens, self._sizes)
                logits = self.model.forward(batch.step)
                token_ids = self._sample(batch, logits)
                logprobs = self._logprobs(batch, logits, token_ids)
                outputs += self._advance(scheduled, batch.sampled, token_ids, logprobs)
            except BaseException as error:
                outputs += self._fail(scheduled, error)
                if not isinstance(error, Exception):
                    self._undelivered = outputs
                    raise
        if self.config.debug:
            self.scheduler.check()
        return outputs

    def _schedule(self) -> list[ScheduledRequest]:
        scheduled, admitted = self.scheduler.schedule()
        for request in admitted:
            self.logits_processor.set_slot(request.slot, request)
            self.sampler.set_slot(request.slot, request.params, request.seed)
        return scheduled

    def _sample(self, batch: Batch, logits: torch.Tensor) -> list[int]:
        if not batch.sampled:
            return []
        processed = self.logits_processor.apply(logits, batch.slots)
        tokens = self.sampler.sample(processed, batch.slots, batch.positions)
        self.logits_processor.observe(batch.slots, tokens)
        return tokens.tolist()

    def _logprobs(
        self, batch: Batch, logits: torch.Tensor, token_ids: list[int]
    ) -> dict[str, tuple[dict[int, Logprob], ...]]:
        """Of the requests that asked for them, by request id."""
        wanted = [request.params.logprobs for request in batch.sampled]
        rows = [
            row
            for row, count in enumerate(wanted)
            if count is not None and token_ids[row] != NO_TOKEN
        ]
        if not rows:
            return {}
        index = torch.tensor(rows).to(logits.device)
        counts = [wanted[row] or 0 for row in rows]
        found = top_logprobs(logits[index], [token_ids[row] for row in rows], counts)
        names = [batch.sampled[row].request_id for row in rows]
        return {name: (one,) for name, one in zip(names, found, strict=True)}

    def _advance(
        self,
        scheduled: list[ScheduledRequest],
        sampled: list[Request],
        token_ids: list[int],
        logprobs: dict[str, tuple[dict[int, Logprob], ...]],
    ) -> list[StepOutput]:
        """Account for what was run and sampled; ends requests that are complete."""
        for item in scheduled:
            item.request.num_computed_tokens += item.num_tokens
        outputs = []
        for request, token_id in zip(sampled, token_ids, strict=True):
            if request.state is not RequestState.RUNNING:
                continue
            if token_id == NO_TOKEN:
                self.abort(request.request_id)
                outputs.append(StepOutput(request.request_id, error=_no_token(request)))
                continue
            reason, stop_reason = request.append(token_id)
            if reason is not None:
                self.abort(request.request_id)
            name = request.request_id
            mine = logprobs.get(name, ())
            outputs.append(StepOutput(name, (token_id,), reason, stop_reason, logprobs=mine))
        return outputs

    def _fail(self, scheduled: list[ScheduledRequest], error: BaseException) -> list[StepOutput]:
        """End all requests of a step that went wrong."""
        ended = [item.request.request_id for item in scheduled]
        return [StepOutput(name, error=error) for name in ended if self.abort(name)]

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """The request's own, and the token behind which a model's positions would be others."""
        stops, padding = frozenset(params.stop_token_ids or ()), self.limits.padding_token
        return stops if padding is None else stops | {padding}

    def _max_total_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        if params.max_tokens is None:
            return self.limits.max_seq_len
        return min(num_prompt_tokens + params.max_tokens, self.limits.max_seq_len)


def _no_token(request: Request) -> RequestError:
    return RequestError(
        f"request {request.request_id!r} has no token to choose from after "
        f"{len(request.token_ids)}: its logits are NaN, or allowed_token_ids, bad_words, "
        "no_repeat_ngram_size and min_tokens together leave none; loosen those"
    )
