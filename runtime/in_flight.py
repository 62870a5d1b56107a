"""A step that is under way: what was launched, in which places."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.runtime.beams import Beams
from inlay.runtime.launcher import Pending
from inlay.runtime.request import Request, RequestState
from inlay.runtime.scheduler import ScheduledRequest
from inlay.runtime.step_runner import Result, Work


@dataclass(frozen=True)
class Row:
    """A sequence that a step samples a token for, in the place that it had then."""

    request: Request
    epoch: int

    @property
    def is_current(self) -> bool:
        return self.request.state is RequestState.RUNNING and self.request.epoch == self.epoch


@dataclass(frozen=True)
class Launched:
    """A step that is under way. beams: searches, and the rows of scores that each has."""

    items: list[ScheduledRequest]
    rows: list[Row]
    beams: list[tuple[Beams, list[Row]]]
    work: Work
    pending: Pending[Result]
    begin: float
