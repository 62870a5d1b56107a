"""A run's logits against Hugging Face's: RMS error, KL divergence, tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from inlay.lowering.capture import REFERENCE, build_shell
from inlay.lowering.guards import (
    FLOAT32_TOLERANCE,
    NOISE_FACTOR,
    ROUTED_SHARE,
    in_float32,
    run_alone,
)
from inlay.verify.tokens import TokenComparison, count_tokens
from inlay.verify.workload import Run


@dataclass
class Distance:
    """How far logits are from Hugging Face's in float32, over many rows.

    rms: root mean square of the difference over that of the reference. kl_mean, kl_max: KL
    divergence KL(reference || logits) of the rows, in nats. largest: difference of one logit.
    """

    rms: float
    kl_mean: float
    kl_max: float
    largest: float


@dataclass
class Measured:
    """ours: the engine. hugging_face: Hugging Face in the engine's dtype, None where that is
    float32. row_errors: for each request the relative RMS error of each of its rows. num_greedy:
    requests whose tokens are all those of Hugging Face's own greedy search in float32."""

    ours: Distance
    hugging_face: Distance | None
    tokens: TokenComparison
    row_errors: list[list[float]]
    num_greedy: int = 0


@dataclass
class _Sums:
    """Numbers of rows, in float64, so that no logits need to be kept.

    share: of the rows, those that are least off, see guards.ROUTED_SHARE.
    """

    share: float
    reference: float = 0.0
    differences: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    largest: float = 0.0

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> list[float]:
        """Count rows [n, vocab]; returns each row's relative RMS error."""
        exact, other = reference.double(), logits.double()
        largest = float((exact - other).abs().max())
        self.largest = max(self.largest, largest)
        differences, squares = (exact - other).square().sum(-1), exact.square().sum(-1)
        self.differences += differences.tolist()
        self.reference += float(squares.sum())
        log_p, log_q = exact.log_softmax(-1), other.log_softmax(-1)
        self.divergences += (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).tolist()
        return (differences / squares).sqrt().tolist()

    def distance(self) -> Distance:
        kept = max(int(self.share * len(self.differences)), 1)
        differences, divergences = (
            torch.tensor(rows, dtype=torch.float64).sort().values  # NaN comes last
            for rows in (self.differences, self.divergences)
        )
        if bool(differences.isnan().any()):
            return Distance(*[float("nan")] * 4)
        rms = float(differences[:kept].sum() * len(differences) / kept / self.reference) ** 0.5
        kl_mean, kl_max = float(divergences[:kept].mean()), float(divergences[-1])
        return Distance(rms, kl_mean, kl_max, self.largest)


@torch.inference_mode()
def measure(run: Run, model: PreTrainedModel, max_seq_len: int) -> Measured:
    """Compare every row of a run with Hugging Face, teacher-forced, each request alone."""
    exact, native = in_float32(build_shell(model, REFERENCE, max_seq_len=max_seq_len)), None
    if model.dtype != torch.float32:
        native = build_shell(model, REFERENCE, max_seq_len=max_seq_len)
    routed = native is not None and any("expert" in name for name, _ in model.named_modules())
    share = ROUTED_SHARE if routed else 1.0
    ours, theirs = _Sums(share), _Sums(share)
    row_errors, references = [], []
    for request in run.requests:
        ids = torch.tensor([[*request.prompt, *request.tokens[:-1]]])
        wanted = torch.arange(len(request.prompt) - 1, ids.shape[1])
        reference = _logits(exact, ids, wanted)
        row_errors.append(ours.add(reference, request.logits))
        references.append(reference)
        if native is not None:
            theirs.add(reference, _logits(native, ids, wanted))
    distance, other = ours.distance(), None if native is None else theirs.distance()
    # A near tie is one for logits that are right: no excuse grows with what is wrong.
    allowed = FLOAT32_TOLERANCE if other is None else NOISE_FACTOR * other.rms
    error = distance.rms if distance.rms <= allowed else allowed
    tokens, num_greedy = TokenComparison(0, 0, 0), 0
    for request, reference in zip(run.requests, references, strict=True):
        counted = count_tokens(torch.tensor(request.tokens), reference, error)
        # Up to the first other token the texts are one, so equal choices make an equal text.
        num_greedy += counted.num_equal == counted.num_tokens
        tokens = counted + tokens
    return Measured(distance, other, tokens, row_errors, num_greedy)


def _logits(model: PreTrainedModel, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Logits of some positions, [n, vocab]."""
    return run_alone(model, ids)[wanted].float()
