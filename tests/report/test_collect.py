"""Facts of models and artifacts, and of lowerings that fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from inlay.backends.atomic import check_target
from inlay.engine import Engine, build
from inlay.errors import ModelLoadError, OptionError, VerificationError
from inlay.lowering.options import CompileOptions
from inlay.passes.graph import calls
from inlay.passes.pass_manager import PASSES, Pass
from inlay.report import collect
from inlay.report.collect import of_artifact, of_model
from inlay.report.facts import Report
from tests.report.conftest import FLOAT32, report_of
from tests.toys import build_toy

NAMES = [one.name for one in PASSES]


def test_a_lowering_that_goes_well(llama: Report) -> None:
    assert llama.failure is None
    assert (llama.architecture, llama.dtype, llama.artifact) == ("llama", "float32", False)
    assert [one.name for one in llama.passes] == NAMES
    assert llama.limits["max_seq_len"] == 256
    assert llama.limits["max_num_tokens"] == 64
    assert llama.errors["capture"] < 1e-5
    first, *_, last = llama.passes
    assert first.ops_before is not None
    assert first.ops_before["linear"] == 15
    assert sum(first.ops_before.values()) < first.num_nodes_before  # placeholders are no ops
    assert llama.ops is not None
    assert last.ops_after is not None
    # Partition makes dense what leaves a segment.
    assert set(llama.ops) - set(last.ops_after) <= {"contiguous", "clone"}
    for before, after in zip(llama.passes, llama.passes[1:], strict=False):
        assert before.ops_after == after.ops_before
        assert before.num_nodes_after == after.num_nodes_before
    assert all(one.error is not None and one.error < 1e-5 for one in llama.passes)
    assert [(one.role, one.num_calls) for one in llama.segments] == [
        ("first", 1), ("middle", 1), ("tail", 1), ("LM head", 1),
    ]  # fmt: skip


def test_an_artifact_tells_the_same_of_its_program(llama: Report, tmp_path: Path) -> None:
    options = CompileOptions(backend="eager", dtype="float32", verify="capture", max_num_tokens=64)
    engine = build(build_toy("llama"), tmp_path / "engine", options)
    report = of_artifact("engine", Engine.load(engine.path))
    assert report.artifact
    assert report.segments == llama.segments
    assert report.costs == llama.costs
    assert report.ops == llama.ops
    assert report.weight_bytes == llama.weight_bytes
    assert [one.matches for one in report.passes] == [one.matches for one in llama.passes]
    assert all(one.error is None and one.ops_before is None for one in report.passes)
    assert report.before is None
    assert report.after is not None
    assert report.after.title.startswith("attention 1 ")
    assert [node.op for node in report.after.nodes[:4]] == [
        "query", "key", "value", "inlay.paged_attention",
    ]  # fmt: skip
    assert check_target(engine.path) is None  # still whole


def test_a_pass_that_changes_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_rope(gm: GraphModule) -> int:
        for node in calls(gm, torch.ops.inlay.rope.default):
            node.replace_all_uses_with(node.args[0])
        return 2

    report = _broken(monkeypatch, tmp_path, Pass("fuse_gated_activation", forget_rope))
    assert report.failure is not None
    assert report.failure.stage == "pass fuse_gated_activation"
    assert report.failure.kind == VerificationError.__name__
    assert "first at" in report.failure.message
    assert [one.name for one in report.passes] == NAMES[: NAMES.index("fuse_gated_activation")]
    assert report.skipped == tuple(NAMES[NAMES.index("fuse_gated_activation") :])
    assert report.before is not None
    assert report.after is not None
    assert not report.costs


def test_a_pass_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(gm: GraphModule) -> int:
        raise IndexError("no such argument")

    report = _broken(monkeypatch, tmp_path, Pass("canonicalise", broken))
    assert report.failure is not None
    assert (report.failure.stage, report.failure.kind) == ("pass canonicalise", "PassError")
    assert "no such argument" in report.failure.message
    assert report.passes == ()
    assert report.skipped == tuple(NAMES)


def _broken(monkeypatch: pytest.MonkeyPatch, path: Path, wrong: Pass) -> Report:
    """A report with a wrong pass in the place of the one of its name."""
    passes: Sequence[Pass] = [wrong if one.name == wrong.name else one for one in PASSES]
    monkeypatch.setattr(collect, "PASSES", tuple(passes))
    return report_of(build_toy("llama"), path / "llama")


def test_a_capture_that_is_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> float:
        raise VerificationError("the captured graph does not compute what Hugging Face computes")

    monkeypatch.setattr(collect, "check_capture", wrong)
    report = report_of(build_toy("llama"), tmp_path / "llama")
    assert report.failure is not None
    assert report.failure.stage == "capture"
    assert report.passes == ()
    assert report.before is not None


def test_what_there_is_no_report_about(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="not a directory"):
        of_model(str(tmp_path / "nowhere"), FLOAT32, lambda line: None)
    build_toy("llama").save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="max_position_embeddings"):
        of_model(str(tmp_path), replace(FLOAT32, max_seq_len=9999), lambda line: None)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_other_families(name: str, tmp_path: Path) -> None:
    report = report_of(build_toy(name), tmp_path / name)
    assert report.failure is None
    assert report.before is not None
    assert report.after is not None
    assert report.after.num_ops < report.before.num_ops
    assert sum(node.kind == "attention" for node in report.after.nodes) == 1
    assert len(report.costs) == 3
