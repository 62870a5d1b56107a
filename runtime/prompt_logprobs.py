"""Log probabilities of a prompt's own tokens, chunk by chunk as it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.runtime.logprobs import TopTokens, find_top_tokens, read_top_tokens
from inlay.runtime.outputs import Logprob
from inlay.runtime.sampler import to_device
from inlay.runtime.scheduler import ScheduledRequest

Found = tuple[dict[int, Logprob] | None, ...]


@dataclass(frozen=True)
class _Piece:
    """Rows [begin, end) of the logits, which predict these tokens of the prompt."""

    item: ScheduledRequest
    begin: int
    tokens: list[int]


@dataclass(frozen=True)
class PromptLogprobs:
    """A step's share of them; `of` and `read` on the host, `run` on the device."""

    pieces: list[_Piece]

    @classmethod
    def of(cls, items: Sequence[ScheduledRequest], rows: Sequence[int]) -> PromptLogprobs:
        """rows: each sequence's last row of logits."""
        pieces = []
        for item, row in zip(items, rows, strict=True):
            if item.all_logits:
                request = item.request
                last = min(item.end + 1, request.num_prompt_tokens)
                tokens = request.token_ids[item.start + 1 : last]
                pieces.append(_Piece(item, row - item.num_tokens + 1, tokens))
        return cls(pieces)

    def run(self, logits: torch.Tensor) -> list[TopTokens]:
        """logits [R, vocab]; what is to be read when the device is done."""
        found = []
        for piece in self.pieces:
            rows = logits[piece.begin : piece.begin + len(piece.tokens)]
            tokens = to_device(np.array(piece.tokens, dtype=np.int64), logits.device)
            width = piece.item.request.params.prompt_logprobs or 0
            found.append(find_top_tokens(rows, tokens, width))
        return [tops.to_host() for tops in found]

    def read(self, results: list[TopTokens]) -> list[tuple[ScheduledRequest, Found]]:
        """For each sequence what it has not been given yet; of a prompt's first token, None."""
        outputs = []
        for piece, result in zip(self.pieces, results, strict=True):
            request = piece.item.request
            if not piece.item.is_current:
                continue
            width = request.params.prompt_logprobs or 0
            found: list[dict[int, Logprob] | None] = []
            found += read_top_tokens(result, [width] * len(piece.tokens))
            first = piece.item.start + 1
            if piece.item.start == 0:
                found, first = [None, *found], 0
            # After a preemption the prompt is run again.
            new = found[max(request.num_prompt_logprobs - first, 0) :]
            request.num_prompt_logprobs += len(new)
            if new:
                outputs.append((piece.item, tuple(new)))
        return outputs
