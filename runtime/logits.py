"""What requests ask of their logits before a token is chosen: penalties, biases, bans.

Applied in this order, to rows of requests that ask for any of it: repetition, presence and
frequency penalties; logit_bias; then what must not come is set to -inf (allowed_token_ids,
bad_words_ids, no_repeat_ngram_size, end tokens before min_tokens).

The host looks at tokens in `plan...`, the device works in `launch...`: see `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from inlay.runtime.request import Request
from inlay.runtime.sampler import to_device

_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass
class _Bans:
    """What one request must not be given next, from its tokens so far."""

    request: Request
    ngrams: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    num_indexed: int = 0

    def next(self) -> list[int]:
        """Token ids that must not come now; one may be named twice."""
        request, params = self.request, self.request.params
        tokens = request.token_ids
        banned = self._repeated(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else []
        if len(tokens) - request.num_prompt_tokens < params.min_tokens:
            banned = [*banned, *request.eos_token_ids, *request.stop_token_ids]
        for *before, last in params.bad_words_ids or ():
            if not before or tokens[-len(before) :] == before:
                banned.append(last)
        return banned

    def _repeated(self, size: int) -> list[int]:
        """Tokens that would complete an n-gram that the request has: each is indexed once."""
        tokens = self.request.token_ids
        for end in range(max(self.num_indexed, size - 1), len(tokens)):
            self.ngrams.setdefault(tuple(tokens[end - size + 1 : end]), []).append(tokens[end])
        self.num_indexed = len(tokens)
        return list(self.ngrams.get(tuple(tokens[len(tokens) - size + 1 :]), ()))


@dataclass(frozen=True)
class SlotEdits:
    """A request's wishes on their way to the device. penalties: repetition, presence, frequency."""

    slot: int
    penalties: tuple[float, float, float] | None
    prompt: np.ndarray
    output: np.ndarray
    allowed: np.ndarray | None


@dataclass(frozen=True)
class Edits:
    """What one step changes in the logits of N rows.

    penalised: rows. allowed: (row, slot) pairs. biased, banned: rows and tokens; bias: the values.
    """

    slots: np.ndarray
    penalised: np.ndarray
    allowed: list[tuple[int, int]]
    biased: np.ndarray
    bias: np.ndarray
    banned: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether the logits stay as they are."""
        return not (len(self.penalised) or self.allowed or self.biased.size or self.banned.size)


class LogitsProcessor:
    """State by slot: `plan` and `plan_slot` use only the host's, the launches the device's.

    With overlap a slot may be launched whose set-up was lost with the step before, which failed:
    its request has ended, but those beside it must not.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._size, self._device = (max_num_seqs, vocab_size), device
        # Of the device. Made for the first request that has penalties: often none ever comes.
        self._penalties = torch.zeros(max_num_seqs, 3, device=device)
        self._counts: torch.Tensor | None = None  # [slots, vocab] int32, of the output's tokens
        self._prompt: torch.Tensor | None = None  # [slots, vocab] bool
        self._allowed: dict[int, torch.Tensor] = {}
        # Of the host.
        self._bias: dict[int, tuple[list[int], list[float]]] = {}
        self._bans: dict[int, _Bans] = {}
        self._penalised = np.zeros(max_num_seqs, dtype=bool)
        self._limited = np.zeros(max_num_seqs, dtype=bool)  # has allowed_token_ids
        self._asks = np.zeros(max_num_seqs, dtype=bool)

    def set_slot(self, slot: int, request: Request) -> None:
        """Take over a request, new or (preempted) one with tokens of its own."""
        self.launch_slots([self.plan_slot(slot, request)])

    def plan_slot(self, slot: int, request: Request) -> SlotEdits:
        """The host's half of set_slot."""
        params, start = request.params, request.num_prompt_tokens
        self._bias.pop(slot, None)
        self._bans.pop(slot, None)
        if params.logit_bias:
            self._bias[slot] = list(params.bias), list(params.bias.values())
        if params.bad_words_ids or params.no_repeat_ngram_size or params.min_tokens:
            self._bans[slot] = _Bans(request)
        self._penalised[slot] = params.has_penalties
        self._limited[slot] = params.allowed_token_ids is not None
        self._asks[slot] = params.edits_logits
        penalties, prompt, output, allowed = None, _NOTHING, _NOTHING, None
        if params.has_penalties:
            penalties = (
                params.repetition_penalty,
                params.presence_penalty,
                params.frequency_penalty,
            )
            prompt, output = np.split(np.array(request.token_ids, dtype=np.int64), [start])
            assert (output >= 0).all(), "a slot is set up before its last token is known"
        if params.allowed_token_ids is not None:
            allowed = np.zeros(self._size[1], dtype=bool)
            allowed[list(params.allowed_token_ids)] = True
        return SlotEdits(slot, penalties, prompt, output, allowed)

    def launch_slots(self, setups: Sequence[SlotEdits]) -> None:
        """The device's half of set_slot."""
        for setup in setups:
            self._allowed.pop(setup.slot, None)
            if setup.allowed is not None:
                self._allowed[setup.slot] = to_device(setup.allowed, self._device)
            if setup.penalties is not None:
                self._count(setup.slot, setup)

    def _count(self, slot: int, setup: SlotEdits) -> None:
        counts, seen = self._tables()
        row = np.array(setup.penalties, dtype=np.float32)
        self._penalties[slot] = to_device(row, self._device)
        seen[slot] = False
        seen[slot].index_fill_(0, to_device(setup.prompt, self._device), True)
        counts[slot] = 0
        output = to_device(setup.output, self._device)
        counts[slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of the output's tokens, and which are the prompt's."""
        if self._counts is None or self._prompt is None:
            self._counts = torch.zeros(self._size, dtype=torch.int32, device=self._device)
            self._prompt = torch.zeros(self._size, dtype=torch.bool, device=self._device)
        return self._counts, self._prompt

    def apply(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Logits [N, vocab] of the requests in these slots, as they are to be sampled from.

        Rows that ask for nothing are as they were; where none does, so is the tensor.
        """
        return self.launch(self.plan(slots), logits)

    def plan(self, slots: np.ndarray) -> Edits:
        """What is to be done with the next step's rows, from their requests' tokens so far."""
        asking = np.flatnonzero(self._asks[slots])
        biased, bias, banned, allowed = [], [], [], []
        for row, slot in zip(asking.tolist(), slots[asking].tolist(), strict=True):
            if slot in self._bias:
                tokens, values = self._bias[slot]
                biased += [(row, token) for token in tokens]
                bias += values
            if slot in self._bans:
                banned += [(row, token) for token in self._bans[slot].next()]
            if self._limited[slot]:
                allowed.append((row, slot))
        return Edits(
            slots=slots,
            penalised=np.flatnonzero(self._penalised[slots]),
            allowed=allowed,
            biased=np.array(biased, dtype=np.int64).reshape(-1, 2).T,
            bias=np.array(bias, dtype=np.float32),
            banned=np.array(banned, dtype=np.int64).reshape(-1, 2).T,
        )

    def launch(self, edits: Edits, logits: torch.Tensor) -> torch.Tensor:
        """The device's half of apply."""
        if edits.is_empty:
            return logits
        logits = logits[: len(edits.slots)].float().clone()
        if len(edits.penalised):
            self._penalise(logits, edits.penalised, edits.slots[edits.penalised])
        if edits.biased.size:
            values = to_device(edits.bias, self._device)
            logits.index_put_(self._places(edits.biased), values, accumulate=True)
        for row, slot in edits.allowed:
            if slot in self._allowed:
                logits[row].masked_fill_(~self._allowed[slot], -torch.inf)
        if edits.banned.size:
            logits[self._places(edits.banned)] = -torch.inf
        return logits

    def _places(self, rows_and_tokens: np.ndarray) -> tuple[torch.Tensor, ...]:
        return to_device(rows_and_tokens, self._device).unbind(0)

    def _penalise(self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        all_counts, seen = self._tables()
        index, where = to_device(np.stack((rows, slots)), self._device).unbind(0)
        repetition, presence, frequency = self._penalties[where, :, None].unbind(1)
        counts, chosen = all_counts[where], logits[index]
        came = counts > 0
        weaker = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(came | seen[where], weaker, chosen)
        logits[index] = chosen - frequency * counts - presence * came

    def observe(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """Count the tokens [N] that these slots were given."""
        self.launch_observe(self.plan(slots), tokens)

    def launch_observe(self, edits: Edits, tokens: torch.Tensor) -> None:
        """Count the tokens [N] that these rows were given."""
        if not len(edits.penalised):
            return
        counts, _ = self._tables()
        rows = np.stack((edits.penalised, edits.slots[edits.penalised]))
        index, where = to_device(rows, self._device).unbind(0)
        given = tokens[index].clamp_min(0)
        ones = torch.ones_like(given, dtype=torch.int32)
        counts.index_put_((where, given), ones, accumulate=True)
