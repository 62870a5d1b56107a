"""Are the tokens right? Generated tokens against Hugging Face, position by position.

Hugging Face is run once over prompt and output together (teacher forcing), so that one early
difference does not hide what follows, and each generated token is compared with its own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from inlay.runtime.outputs import RequestOutput

GAP_FACTOR = 10.0
"""A differing token is excused where Hugging Face itself hardly prefers its own: where its top-1
gap is at most this many times the error of the logits."""

MAX_EXCUSED = 1e-3
"""Share of positions that may be excused in float32. Gaps are spread over the logits' range, so
with larger errors (bfloat16) near ties are as frequent as the excused gap is wide."""


@dataclass(frozen=True)
class TokenComparison:
    """num_tokens compared; num_equal to Hugging Face's greedy choice; num_excused, see above;
    max_excused, the share of excused tokens that passes."""

    num_tokens: int
    num_equal: int
    num_excused: int
    max_excused: float = MAX_EXCUSED

    def __add__(self, other: TokenComparison) -> TokenComparison:
        return TokenComparison(
            self.num_tokens + other.num_tokens,
            self.num_equal + other.num_equal,
            self.num_excused + other.num_excused,
            self.max_excused,
        )

    @property
    def num_wrong(self) -> int:
        return self.num_tokens - self.num_equal - self.num_excused

    @property
    def passed(self) -> bool:
        allowed = max(1, round(self.max_excused * self.num_tokens))
        return self.num_wrong == 0 and self.num_excused <= allowed


def count_tokens(
    chosen: torch.Tensor, logits: torch.Tensor, relative_error: float
) -> TokenComparison:
    """Compare tokens [n] with the greedy choice of the reference's logits [n, vocab]."""
    best = logits.max(dim=-1)
    gap = best.values - logits.gather(1, chosen[:, None])[:, 0]
    error = relative_error * logits.pow(2).mean().sqrt()
    equal = best.indices == chosen
    excused = ~equal & (gap <= GAP_FACTOR * error)
    max_excused = max(MAX_EXCUSED, GAP_FACTOR * relative_error)
    return TokenComparison(len(chosen), int(equal.sum()), int(excused.sum()), max_excused)


@torch.inference_mode()
def compare_greedy(
    outputs: Sequence[RequestOutput], reference: PreTrainedModel, relative_error: float
) -> TokenComparison:
    """Compare greedy outputs with a Hugging Face model of the same weights.

    reference: with eager attention, in float32 for a verdict that means something.
    relative_error: RMS error of the engine's logits over their RMS, as its manifest states.

    Raises what a request failed of: tokens that never came are not right.
    """
    total = TokenComparison(0, 0, 0, max(MAX_EXCUSED, GAP_FACTOR * relative_error))
    for output in outputs:
        if output.error is not None:
            raise output.error
        prompt, generated = output.prompt_token_ids, list(output.outputs[0].token_ids)
        ids = torch.tensor([[*prompt, *generated]])
        logits = reference(input_ids=ids, use_cache=False).logits[0].float()
        total += count_tokens(torch.tensor(generated), logits[len(prompt) - 1 : -1], relative_error)
    return total
