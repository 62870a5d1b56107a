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

from inlay.bench.shapes import build_shape

NEAR = 0.1
"""A near tie: the reference's logit of the token is this close to its best one, in standard
deviations of the row. The best of 32,000 random logits leads the next by 0.25 on average."""

MOST_DEFICIT = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.2, "int4": 2.0}
"""By precision, for figures to count: several times what rounding to nearest costs a model of 24
layers of `save_checkpoint` (nothing but ties, 0.004, 0.011 and, in groups of 32, 1.1), and below
the 4 of tokens that have nothing to do with the model."""

QUERY_KEY_GAIN = 0.5


def save_checkpoint(shape: str, directory: Path) -> Path:
    """A checkpoint of this shape unless it is there; random, with calmer attention than
    `save_shape` makes: there 24 layers amplify rounding so much that bfloat16 changes every second
    token, and int4 gives tokens that say nothing."""
    if not (directory / "config.json").is_file():
        model = build_shape(shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    parameter.mul_(QUERY_KEY_GAIN)
        model.save_pretrained(directory)
    return directory


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
        return self.deficit <= MOST_DEFICIT[precision]


def distances(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of logits [..., vocab]: how far each row's token is below its best one, in the row's standard
    deviations."""
    logits = logits.float()
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return (logits.amax(-1) - chosen) / logits.std(-1)


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
        return distances(result.logits[0], torch.tensor(output)).tolist()
