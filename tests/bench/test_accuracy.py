"""The bench of accuracy asks for every precision with every cache, and fails where one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inlay.bench import accuracy


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str], verdicts: dict[Any, str]) -> int:
    """With stand-ins for compiling and judging; verdicts: by precision and cache."""

    def judge(engine: str, kv_cache_dtype: str) -> SimpleNamespace:
        facts = {
            "perplexity": 4.02,
            "reference_perplexity": 4.0,
            "increase": {"value": 0.005, "low": 0.004, "high": 0.006},
            "limit": 0.01,
            "kl_mean": 1e-3,
            "top1_agreement": 0.99,
            "verdict": verdicts.get((engine, kv_cache_dtype), "pass"),
        }
        return SimpleNamespace(to_json=lambda: facts)

    monkeypatch.setattr(accuracy, "compile_model", lambda _, dtype, quantization: quantization)
    monkeypatch.setattr(accuracy, "evaluate", judge)
    monkeypatch.setattr(sys, "argv", ["accuracy", *arguments])
    return accuracy.main()


def test_every_precision_with_every_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "accuracy.jsonl"
    assert run(monkeypatch, ["--output", str(output)], {}) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [(line["quantization"], line["kv_cache_dtype"]) for line in lines]
    assert asked == [(q, kv) for q in accuracy.PRECISIONS for kv in accuracy.CACHES]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(lines)
    assert "w8a8  KV  int8  perplexity 4.0200 of 4.0000: +0.5000%" in told[7]


def test_one_that_fails_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quantization", "w8a8", "--kv-cache-dtype", "auto", "fp8"]
    assert run(monkeypatch, arguments, {}) == 0
    assert run(monkeypatch, arguments, {("w8a8", "fp8"): "fail"}) == 1
    assert run(monkeypatch, arguments, {("w8a8", "fp8"): "undecided"}) == 1
