"""Evaluations for people: a table, a row for each engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from inlay.eval.evaluation import FAIL, UNDECIDED, Evaluation

HEADINGS = ("perplexity", "increase", "95 % interval", "limit", "KL mean", "KL p99", "top-1")


def lines(names: Sequence[str], evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Evaluations of engines, by what to call them, beside one reference on one text."""
    setting, first = evaluations[0].setting, evaluations[0]
    yield (
        f"{setting.num_tokens} tokens of {setting.text}, {setting.num_windows} windows of up to "
        f"{setting.window} tokens, {setting.stride} judged in each"
    )
    exact = first.reference_perplexity
    yield f"{setting.reference}, Hugging Face in float32: perplexity {exact:.4f}"
    width = max(map(len, names))
    yield f"{'':{width}}" + "".join(f"  {heading:>18}" for heading in HEADINGS) + "  greedy match"
    for name, one in zip(names, evaluations, strict=True):
        yield f"{name:{width}}" + "".join(f"  {cell:>18}" for cell in _cells(one))
    for name, one in zip(names, evaluations, strict=True):
        yield f"{name} ({what(one.to_json()['setting'])}): {one.verdict.upper()}" + _why(one)


def what(setting: Mapping[str, Any]) -> str:
    """The engine's kind in a few words."""
    cache = setting["kv_cache_dtype"]
    parts = [setting["quantization"], setting["dtype"], setting["backend"]]
    parts += [f"KV cache {cache}"] if cache != "auto" else []
    return ", ".join(part for part in parts if part)


def summary(facts: Mapping[str, Any]) -> str:
    """One line for a verdict that was kept in an artifact."""
    setting, increase = facts["setting"], facts["increase"]
    return (
        f"{facts['verdict']}: perplexity {_share(increase['value'])} "
        f"({_share(increase['low'])} to {_share(increase['high'])}; limit "
        f"{_share(facts['limit'])}), {what(setting)}, {setting['num_tokens']} tokens of "
        f"{setting['text']} (sha256 {setting['text_sha256'][:12]})"
    )


def _cells(one: Evaluation) -> list[str]:
    cells = [
        f"{one.perplexity:.4f}",
        _share(one.increase.value),
        f"{_share(one.increase.low)} {_share(one.increase.high)}",
        _share(one.limit),
        f"{one.kl_mean:.2e}",
        f"{one.kl_p99:.2e}",
        f"{one.top1_agreement:.2%}",
    ]
    if one.greedy is not None:
        cells.append(f"{one.greedy.mean_length:.1f} of {one.greedy.num_tokens}")
    return cells


def _share(value: float | None) -> str:
    return "?" if value is None or not math.isfinite(value) else f"{value:+.3%}"


def _why(one: Evaluation) -> str:
    if one.verdict == UNDECIDED:
        return ": the text fills one window, which leaves no interval; give a longer one"
    if one.verdict == FAIL and one.increase.value <= one.limit:
        return ": the interval reaches beyond the limit; a longer text would narrow it"
    return ""
