"""The sequences of one beam search, and the search itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inlay.runtime.beam_search import BeamSearch, Hypothesis
from inlay.runtime.processors import BatchedProcessors
from inlay.runtime.request import Request

if TYPE_CHECKING:
    import torch

    from inlay.runtime.scheduler import Scheduler


@dataclass(eq=False)
class Beams:
    """family: a sequence for each beam; the first one runs the prompt alone.

    processors: the engine's own. RequestError where the request's own cannot be made.
    """

    family: list[Request]
    processors: BatchedProcessors
    search: BeamSearch = field(init=False)

    def __post_init__(self) -> None:
        """Begin."""
        self.restart()

    @property
    def live(self) -> list[Request]:
        """Those whose next tokens the search wants to see."""
        return self.family[:1] if self.family[0].siblings else self.family

    def restart(self) -> None:
        """Begin again from the prompt."""
        first = self.family[0]
        self.search = BeamSearch(
            first.params,
            first.token_ids[: first.num_prompt_tokens],
            first.eos_token_ids,
            first.stop_token_ids,
            first.max_total_tokens,
            request_id=first.request_id,
            batched=self.processors,
        )

    def advance(self, scores: torch.Tensor, scheduler: Scheduler) -> list[Hypothesis] | None:
        """Let the search choose, and move blocks and tokens with the beams; its end, if this is it.

        scores: float32 [live, vocab], log probabilities behind each live beam. RequestError where
        there is nothing to choose from, or a logits processor fails.
        """
        for request in self.live:
            request.drop_pending()
        choices = self.search.advance(scores)
        if choices is None:
            return self.search.hypotheses()
        family = self.family
        if family[0].siblings:
            scheduler.fork(family[0])
        slots, parents = [one.slot for one in family], [parent for parent, _ in choices]
        scheduler.kv_cache.reorder(slots, parents, family[0].num_computed_tokens)
        histories = [[*family[parent].token_ids, token] for parent, token in choices]
        for request, history in zip(family, histories, strict=True):
            request.token_ids = history
        return None
