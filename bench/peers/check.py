"""Whether a system's greedy tokens are those of the model: Hugging Face in float32 is asked of
each token behind the very tokens before it, so that one difference does not spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NEAR = 0.1
"""A near tie: the reference's logit of the token is this close to its best one, in standard
deviations of the row. The best of 32,000 random logits leads the next by 0.25 on average, and
bfloat16 moves them by some 0.03."""

LEAST_NEAR = {"fp32": 0.99, "bf16": 0.9, "int8": 0.6, "int4": 0.1}
"""Of the tokens, by precision, for an output to count: far below what a right implementation of
random weights gives, and far above the chance of a wrong one, 1e-4."""


@dataclass(frozen=True)
class Score:
    """top1, near: share of the tokens that are the reference's first, or nearly so.
    deficit: mean distance to the best logit in standard deviations (of a random token: about 4).
    num_tokens: that were looked at."""

    top1: float
    near: float
    deficit: float
    num_tokens: int

    def is_right(self, precision: str) -> bool:
        return self.near >= LEAST_NEAR[precision]


class Reference:
    """The checkpoint in float32, kept while outputs are scored."""

    def __init__(self, checkpoint: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self.model = model.eval()
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}

    def score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Score:
        """Of (prompt, output) pairs; equal ones are looked at once."""
        distances: list[float] = []
        for prompt, output in pairs:
            key = (tuple(prompt), tuple(output))
            if key not in self._known:
                self._known[key] = self._distances(prompt, output)
            distances += self._known[key]
        return Score(
            top1=statistics.fmean(d == 0 for d in distances),
            near=statistics.fmean(d <= NEAR for d in distances),
            deficit=statistics.fmean(distances),
            num_tokens=len(distances),
        )

    @torch.inference_mode()
    def _distances(self, prompt: list[int], output: list[int]) -> list[float]:
        ids = torch.tensor([prompt + output[:-1]])
        result: Any = self.model(ids, logits_to_keep=len(output))
        logits = result.logits[0].float()  # [num_output_tokens, vocab]
        chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        return ((logits.amax(1) - chosen) / logits.std(1)).tolist()
