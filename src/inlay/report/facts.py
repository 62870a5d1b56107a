"""The facts of a report: plain data, from whichever source, for whichever form of output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from inlay.backends.program import AttentionStep
from inlay.passes.pass_manager import PassReport
from inlay.report.cost import StepCost
from inlay.report.layer import Layer

OpCounts = Mapping[str, int]


@dataclass(frozen=True)
class PassFacts:
    """A pass's report, and how often each op occurred before and after it (None: not recorded)."""

    name: str
    matches: int
    expected: int | None
    seconds: float
    num_nodes_before: int
    num_nodes_after: int
    misses: tuple[str, ...] = ()
    error: float | None = None
    ops_before: OpCounts | None = None
    ops_after: OpCounts | None = None

    @staticmethod
    def of(
        report: PassReport | Mapping[str, Any],
        before: OpCounts | None = None,
        after: OpCounts | None = None,
    ) -> PassFacts:
        """From a report in memory or in a manifest."""
        given = asdict(report) if isinstance(report, PassReport) else report
        known = {field.name for field in fields(PassReport)} & set(given)
        values = {name: given[name] for name in known} | {"misses": tuple(given["misses"])}
        return PassFacts(**values, ops_before=before, ops_after=after)

    @property
    def changed_ops(self) -> list[tuple[str, int, int]]:
        """Op, count before, count after: of those whose count changed, most removed first."""
        if self.ops_before is None or self.ops_after is None:
            return []
        before, after = self.ops_before, self.ops_after
        rows = [(op, before.get(op, 0), after.get(op, 0)) for op in {**before, **after}]
        return sorted((r for r in rows if r[1] != r[2]), key=lambda r: (r[2] - r[1], r[0]))


@dataclass(frozen=True)
class SegmentFacts:
    """role: where in the program. num_calls: in one step. num_ops, weight_bytes: of one call."""

    role: str
    key: str
    num_calls: int
    num_ops: int
    weight_bytes: int


@dataclass(frozen=True)
class AttentionFacts:
    """Layers whose attention is alike; step is that of the first."""

    layers: tuple[int, ...]
    step: AttentionStep


@dataclass(frozen=True)
class Failure:
    """What went wrong. stage: "capture", "partition", or a pass by name; kind: the error's."""

    stage: str
    kind: str
    message: str


@dataclass(frozen=True)
class Report:
    """How one model was lowered.

    name: as the user named it. artifact: whether it was an artifact. facts that the source does
    not have are empty: before and ops of an artifact, segments and costs of a failed lowering.
    """

    name: str
    artifact: bool
    architecture: str
    dtype: str
    backend: str
    versions: Mapping[str, str]
    limits: Mapping[str, Any]
    options: Mapping[str, Any]
    target: Mapping[str, Any]
    errors: Mapping[str, float]
    phases: Mapping[str, float]
    passes: tuple[PassFacts, ...]
    skipped: tuple[str, ...] = ()
    failure: Failure | None = None
    segments: tuple[SegmentFacts, ...] = ()
    attentions: tuple[AttentionFacts, ...] = ()
    ops: OpCounts | None = None
    weight_bytes: int = 0
    costs: tuple[StepCost, ...] = ()
    before: Layer | None = None
    after: Layer | None = None
