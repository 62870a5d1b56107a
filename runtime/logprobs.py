"""How likely the model itself finds tokens: of its logits as they are, before any processing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inlay.runtime.outputs import Logprob


def top_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[dict[int, Logprob]]:
    """For each row the tokens[i] that was chosen and the counts[i] likeliest, likeliest first.

    logits: [N, vocab], any float dtype. Ranks count from 1; equal tokens share one.
    """
    # In float64: ranks are compared with what topk gives, and ties must stay ties.
    log_p = logits.double().log_softmax(-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    own = log_p.gather(1, chosen)
    best = log_p.topk(min(max(*counts, 1), log_p.shape[1]), dim=-1)
    ids = torch.cat((best.indices, chosen), dim=1)
    values = torch.cat((best.values, own), dim=1)
    ranks = torch.stack([(log_p > column[:, None]).sum(-1) + 1 for column in values.unbind(1)], 1)
    rows = zip(ids.tolist(), values.tolist(), ranks.tolist(), counts, strict=True)
    found = []
    for row_ids, row_values, row_ranks, count in rows:
        keep = [*range(min(count, len(row_ids) - 1)), len(row_ids) - 1]
        found.append({row_ids[i]: Logprob(row_values[i], row_ranks[i]) for i in keep})
    return found
