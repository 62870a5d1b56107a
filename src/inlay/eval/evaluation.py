"""What is found out about an engine, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from inlay.eval.greedy import GreedyMatch
from inlay.eval.measure import TokenScores
from inlay.eval.statistics import CONFIDENCE, Interval, paired_increase

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"


@dataclass(frozen=True)
class Setting:
    """What was compared, and how. The same setting on the same artifact gives the same numbers.

    reference, text: a name and a sha256 each. window, stride, num_tokens, num_windows: see
    `EvalOptions`.
    """

    backend: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    reference: str
    reference_sha256: str
    text: str
    text_sha256: str
    window: int
    stride: int
    num_tokens: int
    num_windows: int
    made_with: str


@dataclass(frozen=True)
class Evaluation:
    """An engine beside Hugging Face in float32, over the same tokens.

    perplexity, reference_perplexity: exp of the mean negative log-likelihood of a token.
    increase: of the perplexity, as a share, with its paired 95 % interval. kl_mean, kl_p99,
    kl_max: KL(reference || engine) of a token in nats. top1_agreement: share of tokens before
    which both like the same one best. limit: what the upper end of the interval may be.
    """

    setting: Setting
    perplexity: float
    reference_perplexity: float
    increase: Interval
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    greedy: GreedyMatch | None
    limit: float

    @property
    def verdict(self) -> str:
        """ "pass", "fail", or "undecided" where one window leaves no interval."""
        if self.setting.num_windows < 2 and math.isfinite(self.increase.value):
            return UNDECIDED
        return PASS if self.increase.high <= self.limit else FAIL  # NaN fails

    @property
    def ok(self) -> bool:
        return self.verdict == PASS

    def to_json(self) -> dict[str, Any]:
        """Its fields and the verdict; numbers that are not finite are None, as JSON has none."""
        facts: dict[str, Any] = {**asdict(self), "confidence": CONFIDENCE, "verdict": self.verdict}
        return _finite(facts)


def summarize(
    setting: Setting, scores: TokenScores, greedy: GreedyMatch | None, limit: float
) -> Evaluation:
    """The numbers of all tokens together."""
    ours, theirs = torch.cat(scores.ours), torch.cat(scores.theirs)
    divergence = torch.cat(scores.divergence)
    sums = [float(part.sum()) for part in (ours - theirs).split(scores.sizes)]
    return Evaluation(
        setting=setting,
        perplexity=float(ours.mean().exp()),
        reference_perplexity=float(theirs.mean().exp()),
        increase=paired_increase(sums, scores.sizes),
        kl_mean=float(divergence.mean()),
        kl_p99=_percentile(divergence, 0.99),
        kl_max=float(divergence.max()),
        top1_agreement=float(torch.cat(scores.same).double().mean()),
        greedy=greedy,
        limit=limit,
    )


def _percentile(values: torch.Tensor, share: float) -> float:
    """The nearest rank; not torch.quantile, which takes 16 million values at the most."""
    rank = max(math.ceil(share * len(values)), 1)
    return float(values.sort().values[rank - 1])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {k: _finite(v) for k, v in value.items()} if isinstance(value, Mapping) else value
