"""The sequences of one beam search, and the search itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay.runtime.beam_search import BeamSearch
from inlay.runtime.processors import BatchedProcessors
from inlay.runtime.request import Request


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
