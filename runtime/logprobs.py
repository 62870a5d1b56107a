"""How likely the model itself finds tokens: of its logits as they are, before any processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.runtime.outputs import Logprob


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of N rows and, last, the one that was chosen: each [N, K + 1]."""

    ids: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor

    def to_host(self) -> TopTokens:
        """A copy on the host, which on CUDA is there once the stream has come so far."""
        parts = (self.ids, self.values, self.ranks)
        return TopTokens(*(part.to("cpu", non_blocking=True) for part in parts))


def top_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[dict[int, Logprob]]:
    """For each row the tokens[i] that was chosen and the counts[i] likeliest, likeliest first.

    logits: [N, vocab], any float dtype. Ranks count from 1; equal tokens share one.
    """
    chosen = torch.tensor(tokens, device=logits.device)
    return read_top_tokens(find_top_tokens(logits, chosen, max(counts)), counts)


def find_top_tokens(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopTokens:
    """The device's half of top_logprobs: reads nothing back. chosen: int64 [N]."""
    chosen = chosen[:, None]
    # Compared as they are, so that ties stay ties; only their distance to the sum is in float64.
    own = logits.gather(1, chosen)
    best = logits.topk(min(count, logits.shape[1]), dim=-1)
    ids = torch.cat((best.indices, chosen), dim=1)
    found = torch.cat((best.values, own), dim=1)
    values = found.double() - logits.double().logsumexp(-1, keepdim=True)
    # Whatever is likelier than one of the best is among them.
    likelier = (best.values[:, :, None] < best.values[:, None, :]).sum(-1)
    own_rank = (logits > own).sum(-1, keepdim=True)
    return TopTokens(ids, values, torch.cat((likelier, own_rank), dim=1) + 1)


def read_top_tokens(top: TopTokens, counts: Sequence[int]) -> list[dict[int, Logprob]]:
    """The host's half of top_logprobs."""
    rows = zip(top.ids.tolist(), top.values.tolist(), top.ranks.tolist(), counts, strict=True)
    found = []
    for ids, values, ranks, count in rows:
        keep = [*range(min(count, len(ids) - 1)), len(ids) - 1]
        found.append({ids[i]: Logprob(values[i], ranks[i]) for i in keep})
    return found
