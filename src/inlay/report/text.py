"""A model's facts as text for a terminal, and as data for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from inlay.report.facts import PassFacts, Report
from inlay.report.page import numbers, quantity


def as_data(report: Report) -> dict[str, Any]:
    """What --json prints: everything but the pictures."""
    costs = [
        {**asdict(cost), "flops": cost.flops, "bytes": cost.num_bytes} for cost in report.costs
    ]
    data = {**asdict(report), "costs": costs}
    del data["before"], data["after"]
    return data


def as_text(report: Report) -> str:
    """What a model's lowering gave, line by line."""
    lines = [f"{report.name}: {report.architecture}, {report.dtype}"]
    lines += ["  lowered with " + pairs(report.versions), "  limits: " + pairs(report.limits)]
    if report.segments:
        uses = ", ".join(f"{one.role} {one.key} x {one.num_calls}" for one in report.segments)
        lines += [f"  weights: {quantity(report.weight_bytes, 'B')}", f"  segments: {uses}"]
    for one in report.attentions:
        step = one.step
        lines.append(
            f"  attention layers {numbers(one.layers)}: {step.num_heads} query heads, "
            f"{step.num_kv_heads} KV heads, size {step.head_dim}, window {step.window or 'none'}, "
            f"soft-cap {step.softcap or 'none'}"
        )
    lines.append("  error against Hugging Face: " + pairs(report.errors, "{:.1e}"))
    lines += pass_lines(report.passes)
    for cost in report.costs:
        lines.append(
            f"  {cost.workload.name}: {quantity(cost.flops, 'FLOP')}, weights "
            f"{quantity(cost.weight_bytes, 'B')}, KV cache {quantity(cost.kv_bytes, 'B')}"
        )
    return "\n".join(lines)


def pass_lines(passes: Iterable[PassFacts]) -> list[str]:
    lines = ["  passes:"]
    for done in passes:
        due = "" if done.expected is None else f" of {done.expected}"
        error = "" if done.error is None else f", error {done.error:.1e}"
        lines.append(f"    {done.name:<20} {done.matches:>5}{due} in {done.seconds:.3f} s{error}")
        lines += [f"      missed {miss}" for miss in done.misses]
    return lines


def pairs(values: Mapping[str, Any], form: str = "{}") -> str:
    return ", ".join(f"{key} {form.format(value)}" for key, value in values.items())
