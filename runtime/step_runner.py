"""The device's part of a step: everything that touches a tensor, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from inlay.backends.base import LoadedModel
from inlay.runtime.batch import Batch
from inlay.runtime.block_copies import BlockCopier
from inlay.runtime.block_tables import BlockCopy
from inlay.runtime.dispatch import Dispatcher
from inlay.runtime.logprobs import TopTokens
from inlay.runtime.pooling import Pooler
from inlay.runtime.prompt_logprobs import PromptLogprobs
from inlay.runtime.sampler import to_device
from inlay.runtime.sampling import Sampled, SamplingPlan, SamplingStage


@dataclass(frozen=True)
class Work:
    """A step as the device needs it. beam_rows: rows of logits that beam searches choose from."""

    batch: Batch
    copies: Sequence[BlockCopy]
    plan: SamplingPlan
    beam_rows: list[int]
    prompt_logprobs: PromptLogprobs
    pooler: Pooler


@dataclass(frozen=True)
class Result:
    """What the device makes of it, perhaps not there yet. scores: float32 [beam_rows, vocab],
    log probabilities."""

    sampled: Sampled
    scores: torch.Tensor | None
    prompt_logprobs: list[TopTokens]
    pooled: list[torch.Tensor]


@dataclass(frozen=True)
class StepRunner:
    """Called by the launcher, one step after the other; looks at nothing that the host changes."""

    model: LoadedModel
    dispatcher: Dispatcher
    copier: BlockCopier
    sampling: SamplingStage

    def run(self, work: Work) -> Result:
        """Copy blocks, run the model, choose tokens."""
        self.copier.run(work.copies)
        step, plan = work.batch.step.to(self.model.device), work.plan
        work.batch.fill_in(step, self.sampling.last_tokens)
        pooled: list[torch.Tensor] = []
        tokens: torch.Tensor | None = None
        if work.pooler:
            logits, hidden = self.model.forward_hidden(step)
            pooled = work.pooler.run(hidden)
        elif plan.is_plain and not self.sampling.batched.members:
            self.sampling.begin(plan)
            logits, tokens = self.dispatcher.forward_sampled(step, plan.draws)
        else:
            logits = self.dispatcher.forward(step)
        scores = None
        if work.beam_rows:
            rows = to_device(np.array(work.beam_rows), logits.device)
            scores = logits[rows].float().log_softmax(-1)
        prompt_logprobs = work.prompt_logprobs.run(logits)
        # Last: who reads waits for what sampling has begun, and so for all that is before it.
        sampled = self.sampling.launch(plan, logits, tokens)
        return Result(sampled, scores, prompt_logprobs, pooled)
