"""What an artifact holds: for people, and as data for `--json`."""

from __future__ import annotations

from typing import Any

from inlay.backends.artifact import MANIFEST, is_weights
from inlay.engine import Engine
from inlay.eval.report import summary
from inlay.passes.quantize.config import NONE
from inlay.report.facts import PassFacts, Report
from inlay.report.text import pairs, pass_lines

PRODUCTS = (
    *("linear", "int8_linear", "fp8_linear", "weight_only_linear", "experts"),
    *("quantized_experts", "quantized_embedding"),
)
"""Ops that tell what of a model is quantized, and how."""

COPIED = (
    *("inlay", "architecture", "backend", "dtype", "packages", "limits", "options", "target"),
    *("errors", "phases", "passes", "origin", "provenance", "rebuild"),
)
"""Entries of the manifest that are shown as they are."""


def artifact_data(engine: Engine, report: Report, weights_checked: bool) -> dict[str, Any]:
    """The facts of an artifact, from its manifest, program and graphs.

    weights_checked: its weight files were hashed when it was opened; all others always are.
    """
    manifest, program = engine.manifest, engine.artifact.program
    sizes = {name: facts["size"] for name, facts in manifest["files"].items()}
    pruned = manifest.get("pruned")
    segments = {
        one.key: {
            "role": one.role,
            "uses": one.num_calls,
            "ops": one.num_ops,
            "code_bytes": _code(sizes, f"segments/{one.key}/"),
            "weight_bytes": one.weight_bytes,
        }
        for one in report.segments
    }
    graphs = {n: size for n, size in sizes.items() if _is_graph(n)}
    return {
        "path": str(engine.path),
        "manifest_sha256": manifest["manifest_sha256"],
        **{key: manifest[key] for key in COPIED},
        "pruned": None if pruned is None else {"bytes_before": pruned["bytes"]},
        "quantization": _quantization(engine, report),
        "segments": segments,
        "attention_layers": len(program.attention_steps),
        "windows": sorted({step.window for step in program.attention_steps}),
        "weight_bytes": sum(size for name, size in sizes.items() if is_weights(name)),
        "code_bytes": _code(sizes, "segments/"),
        "plan_bytes": sum(size for n, size in sizes.items() if n.endswith(".plan")),
        "compared": manifest.get("checked"),
        "graph_bytes": sum(graphs.values()),
        "total_bytes": sum(sizes.values()),
        "hashes": {
            "files": len(sizes),
            "weight_files": sum(map(is_weights, sizes)),
            "weights_checked": weights_checked,
        },
        "evaluations": engine.evaluations,
    }


def _is_graph(name: str) -> bool:
    return name.endswith("graph.json") or name in ("program.json", "recipe.json")


def _code(sizes: dict[str, int], folder: str) -> int:
    return sum(size for n, size in sizes.items() if n.startswith(folder) and not _is_graph(n))


def _quantization(engine: Engine, report: Report) -> dict[str, Any]:
    recipes = engine.artifact.recipes.values()
    origins = {recipe["origin"] for recipe in recipes if recipe["op"] == "given"}
    ops = report.ops or {}
    return {
        "asked_for": engine.manifest["options"].get("quantization", NONE),
        "given_by": sorted(origins),
        "products": {name: n for name in PRODUCTS if (n := ops.get(f"inlay.{name}", 0))},
    }


def artifact_text(facts: dict[str, Any]) -> str:
    """The same, line by line."""
    hashes = facts["hashes"]
    checked = "all right"
    if not hashes["weights_checked"]:
        checked += f" but {hashes['weight_files']} weight files, which --check-weights checks"
    quantization = facts["quantization"]
    given = "".join(f", numbers from {origin}" for origin in quantization["given_by"])
    lines = [
        f"{facts['path']}: {facts['architecture']}, {facts['dtype']}, {facts['backend']}",
        f"  made by inlay {facts['inlay']} with " + pairs(facts["packages"]),
        *[f"  {_event(one)}" for one in facts["provenance"]],
        "  target: " + (pairs(facts["target"]) or "runs anywhere"),
        "  limits: " + pairs(facts["limits"]),
        f"  {_sizes(facts)}",
        f"  hashes of {hashes['files']} files and {MANIFEST}: {checked}",
        f"  quantization: {quantization['asked_for']}{given}; {pairs(quantization['products'])}",
        f"  attention layers: {facts['attention_layers']}, windows {facts['windows']}",
        *_segment_lines(facts["segments"]),
        "  error against Hugging Face: " + pairs(facts["errors"], "{:.1e}"),
        *[f"  compared was {what}" for what in [facts["compared"]] if what],
        *[f"  evaluation: {summary(one)}" for one in facts["evaluations"]],
        *pass_lines(PassFacts.of(one) for one in facts["passes"]),
        "  phases, s: " + pairs(facts["phases"]),
    ]
    return "\n".join(lines)


def _event(event: dict[str, Any]) -> str:
    """A line of an artifact's history."""
    rest = {name: value for name, value in event.items() if name not in ("made_by", "origin")}
    shown = {n: v[:16] if isinstance(v, str) else v for n, v in rest.items()}
    origin = f" from {event['origin']}" if "origin" in event else ""
    return f"{event['made_by']}{origin}: {pairs(shown)}"


def _sizes(facts: dict[str, Any]) -> str:
    sizes = (("weights", "weight_bytes"), ("code", "code_bytes"), ("graphs", "graph_bytes"))
    text = ", ".join(f"{name} {facts[key] / 1e6:.1f} MB" for name, key in sizes)
    if facts["plan_bytes"]:
        # TensorRT's engines hold their weights, so that each layer has one of its own.
        text += f" (of the code {facts['plan_bytes'] / 1e6:.1f} MB are engines with their weights)"
    if facts["pruned"] is None:
        return text
    return f"PRUNED: {text}; it had {facts['pruned']['bytes_before'] / 1e6:.1f} MB"


def _segment_lines(segments: dict[str, Any]) -> list[str]:
    heading = f"  {'segment':<18}{'role':<10}{'uses':>6}{'ops':>6}"
    heading += f"{'code, kB':>10}{'weights, MB':>13}"
    return [
        heading,
        *(
            f"  {key:<18}{one['role']:<10}{one['uses']:>6}{one['ops']:>6}"
            f"{one['code_bytes'] / 1e3:>10.1f}{one['weight_bytes'] / 1e6:>13.2f}"
            for key, one in segments.items()
        ),
    ]
