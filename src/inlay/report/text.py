"""The report's facts as text for a terminal, and as data for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from inlay.engine import Engine
from inlay.eval.report import summary
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
    lines += _pass_lines(report.passes)
    for cost in report.costs:
        lines.append(
            f"  {cost.workload.name}: {quantity(cost.flops, 'FLOP')}, weights "
            f"{quantity(cost.weight_bytes, 'B')}, KV cache {quantity(cost.kv_bytes, 'B')}"
        )
    return "\n".join(lines)


def artifact_data(engine: Engine) -> dict[str, Any]:
    """The facts of an artifact, from its manifest and program."""
    manifest, program = engine.manifest, engine.artifact.program
    calls = [step.segment for step in program.segment_steps]
    sizes = {name: facts["size"] for name, facts in manifest["files"].items()}
    return {
        "path": str(engine.path),
        **{
            key: manifest[key]
            for key in ("inlay", "architecture", "backend", "dtype", "packages", "limits")
        },
        "target": manifest["target"],
        "errors": manifest["errors"],
        "phases": manifest["phases"],
        "passes": manifest["passes"],
        "segments": {key: calls.count(key) for key in program.segment_keys},
        "attention_layers": len(program.attention_steps),
        "windows": sorted({step.window for step in program.attention_steps}),
        "weight_bytes": sum(size for name, size in sizes.items() if name.endswith(".safetensors")),
        "code_bytes": sum(size for name, size in sizes.items() if name.startswith("segments/")),
        "plan_bytes": sum(size for name, size in sizes.items() if name.endswith(".plan")),
        "checked": manifest.get("checked", ""),
        "rebuild": manifest["rebuild"],
        "evaluations": engine.evaluations,
    }


def artifact_text(facts: dict[str, Any]) -> str:
    """The same, line by line."""
    uses = ", ".join(f"{key} x {count}" for key, count in facts["segments"].items())
    weights, code = facts["weight_bytes"] / 1e6, facts["code_bytes"] / 1e6
    lines = [
        f"{facts['path']}: {facts['architecture']}, {facts['dtype']}, {facts['backend']}",
        f"  made by inlay {facts['inlay']} with " + pairs(facts["packages"]),
        "  target: " + (pairs(facts["target"]) or "runs anywhere"),
        "  limits: " + pairs(facts["limits"]),
        f"  weights: {weights:.1f} MB, code {code:.1f} MB{_plans(facts['plan_bytes'])}",
        f"  attention layers: {facts['attention_layers']}, windows {facts['windows']}",
        f"  segments: {uses}",
        "  error against Hugging Face: " + pairs(facts["errors"], "{:.1e}"),
        *[f"  compared: {what}" for what in [facts["checked"]] if what],
        *[f"  evaluation: {summary(one)}" for one in facts["evaluations"]],
        *_pass_lines(PassFacts.of(one) for one in facts["passes"]),
        "  phases, s: " + pairs(facts["phases"]),
    ]
    return "\n".join(lines)


def _plans(num_bytes: int) -> str:
    """TensorRT's engines hold their weights, so that a layer has one of its own."""
    return f", of which {num_bytes / 1e6:.1f} MB engines with weights in them" if num_bytes else ""


def _pass_lines(passes: Iterable[PassFacts]) -> list[str]:
    lines = ["  passes:"]
    for done in passes:
        due = "" if done.expected is None else f" of {done.expected}"
        error = "" if done.error is None else f", error {done.error:.1e}"
        lines.append(f"    {done.name:<20} {done.matches:>5}{due} in {done.seconds:.3f} s{error}")
        lines += [f"      missed {miss}" for miss in done.misses]
    return lines


def pairs(values: Mapping[str, Any], form: str = "{}") -> str:
    return ", ".join(f"{key} {form.format(value)}" for key, value in values.items())
