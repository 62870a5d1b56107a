"""Beam search of one request: which continuations of its beams live on, and which are the answer.

Step for step what transformers 5 does in `generate(num_beams=W, do_sample=False)`
(GenerationMixin._beam_search), for one prompt, with scores in float32 as there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from inlay.errors import RequestError
from inlay.runtime.logits import LogitsProcessor
from inlay.runtime.outputs import FinishReason
from inlay.runtime.processors import (
    BatchedProcessors,
    can_be_sampled,
    checked_call,
    failure,
    make_processors,
)
from inlay.runtime.request import Request
from inlay.runtime.sampling_params import SamplingParams

NEVER = -1e9
"""Less than any score, and finite: what is finished or not yet there."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished sequence.

    token_ids: the output, the token that ended it included. score: cumulative_logprob over the
    number of these to the power of length_penalty. cumulative_logprob: the natural logarithm of
    its probability, as far as logits processors left that alone.
    """

    token_ids: tuple[int, ...]
    score: float
    cumulative_logprob: float
    finish_reason: FinishReason
    stop_reason: int | None = None


class BeamSearch:
    """`advance` with each step's log probabilities until it gives None; then `hypotheses`."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Collection[int],
        stop_token_ids: Collection[int],
        max_total_tokens: int,
        *,
        request_id: str = "",
        batched: BatchedProcessors | None = None,
    ) -> None:
        """max_total_tokens: of prompt and output. batched: the engine's own logits processors.

        RequestError where one of the request's logits processors cannot be made. There is one for
        all beams, which come in another order each step: it should have no state.
        """
        self.width = params.num_sequences
        self._params, self._prompt = params, list(prompt_token_ids)
        self._eos, self._stop = frozenset(eos_token_ids), frozenset(stop_token_ids)
        self._max_total_tokens, self._request_id = max_total_tokens, request_id
        self._own, self._batched = make_processors(params), batched
        self._editor: LogitsProcessor | None = None
        # Outputs of the running beams, best first, and their log probabilities.
        self._beams: list[list[int]] = [[]]
        self._scores = torch.tensor([0.0] + [NEVER] * (self.width - 1))
        self._finished: list[Hypothesis] = []
        self._can_improve = True

    def hypotheses(self) -> list[Hypothesis]:
        """The best n that have finished, best first; fewer where fewer sequences are possible."""
        return self._finished[: self._params.n]

    def advance(self, log_probs: torch.Tensor) -> list[tuple[int, int]] | None:
        """Choose the beams that go on.

        log_probs: float32 [live, vocab], log_softmax of the logits behind each beam, in the order
            in which they were returned; one row at the first call.
        Returns (parent, token) for each beam of the next step, parent being a row of log_probs; or
        None: the search is over. RequestError where no token is left, or a processor fails.
        """
        assert len(log_probs) == len(self._beams), "rows are the beams that advance returned"
        values, parents, tokens = self._best_continuations(self._process(log_probs))
        length = len(self._beams[0]) + 1
        at_end = len(self._prompt) + length >= self._max_total_tokens
        ends = [at_end or token in self._eos or token in self._stop for token in tokens]
        outputs = [
            [*self._beams[parent], token] for parent, token in zip(parents, tokens, strict=True)
        ]
        self._collect(values, outputs, ends)
        running = values + torch.tensor(ends) * NEVER
        # topk, not a sort: among equals it takes those that transformers takes.
        self._scores, chosen = running.topk(self.width)
        self._beams = [outputs[i] for i in chosen.tolist()]
        self._can_improve = self._can_improve and self._may_improve(length)
        is_full = len(self._finished) == self.width and self._params.early_stopping is True
        if all(ends) or is_full or not self._can_improve:
            return None
        return [(parents[i], tokens[i]) for i in chosen.tolist()]

    def _best_continuations(
        self, log_probs: torch.Tensor
    ) -> tuple[torch.Tensor, list[int], list[int]]:
        """Log probability, parent and token of the best; enough for W that do not end."""
        live, vocab_size = log_probs.shape
        scores = self._scores.to(log_probs.device)
        total = (log_probs.expand(self.width, -1) + scores[:, None]).flatten()
        count = max(2, 1 + len(self._eos | self._stop)) * self.width
        values, index = total.topk(min(count, total.numel()))
        values, index = values.cpu(), index.cpu()
        if not values[0] > NEVER:
            raise RequestError(
                f"beam search has no token to choose from after {len(self._beams[0])}: logits are "
                "NaN, or what the request bans leaves none; loosen that"
            )
        # At the first step all rows are the prompt's.
        parents = (index // vocab_size).clamp_max(live - 1)
        return values, parents.tolist(), (index % vocab_size).tolist()

    def _collect(self, values: torch.Tensor, outputs: list[list[int]], ends: list[bool]) -> None:
        """Take those of the best W that end here among the finished, if they are good enough."""
        is_full = len(self._finished) == self.width and self._params.early_stopping is True
        if is_full or not self._can_improve:
            return
        scores = values / len(outputs[0]) ** self._params.length_penalty
        for i in range(self.width):
            if ends[i] and values[i] > NEVER:
                self._finished.append(
                    self._hypothesis(outputs[i], float(scores[i]), float(values[i]))
                )
        # Stable: of equals the one that was first stays first.
        self._finished.sort(key=lambda one: -one.score)
        del self._finished[self.width :]

    def _hypothesis(self, tokens: list[int], score: float, logprob: float) -> Hypothesis:
        last = tokens[-1]
        if last in self._eos or last in self._stop:
            stop_reason = None if last in self._eos else last
            return Hypothesis(tuple(tokens), score, logprob, "stop", stop_reason)
        return Hypothesis(tuple(tokens), score, logprob, "length")

    def _may_improve(self, length: int) -> bool:
        """Whether the best running beam may still beat the worst of W finished ones."""
        if len(self._finished) < self.width:
            return True
        penalty = self._params.length_penalty
        if self._params.early_stopping == "never" and penalty > 0:
            length = self._max_total_tokens - len(self._prompt)
        return float(self._scores[0] / length**penalty) > self._finished[-1].score

    def _process(self, log_probs: torch.Tensor) -> torch.Tensor:
        """What the request and the engine make of the log probabilities before the search."""
        params = self._params
        if not (params.edits_logits or self._own or self._batched):
            return log_probs
        rows = [self._as_request(i, output) for i, output in enumerate(self._beams)]
        if params.edits_logits:
            if self._editor is None:
                size, device = log_probs.shape[1], log_probs.device
                self._editor = LogitsProcessor(self.width, size, device)
            self._editor.launch_slots([self._editor.plan_slot(row.slot, row) for row in rows])
            plan = self._editor.plan(torch.arange(len(rows)).numpy())
            log_probs = self._editor.launch(plan, log_probs)
        if self._batched is not None:
            log_probs, sound = self._batched.apply(log_probs, rows)
            for name, good in sound:
                self._require(name, good)
        for name, own in self._own:
            calls = [partial(own, self._prompt[:], output[:]) for output in self._beams]
            pairs = zip(calls, log_probs, strict=True)
            log_probs = torch.stack([checked_call(name, call, row) for call, row in pairs])
            self._require(name, can_be_sampled(log_probs))
        return log_probs

    def _require(self, name: str, good: torch.Tensor) -> None:
        if not bool(good.all()):
            raise failure(name, "gave logits that are NaN, +inf, or -inf all of them")

    def _as_request(self, slot: int, output: list[int]) -> Request:
        request = Request(
            self._request_id,
            self._prompt[:],
            self._params,
            seed=0,
            stop_token_ids=self._stop,
            eos_token_ids=self._eos,
            max_total_tokens=self._max_total_tokens,
            slot=slot,
        )
        request.token_ids += output
        return request
