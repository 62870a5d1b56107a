"""The number of compiles does not grow with depth, and nothing is compiled twice."""

from __future__ import annotations

import pytest

from inlay import compile_model
from inlay.passes.pass_manager import PASSES
from tests.toys import build_toy


def test_a_deeper_model_has_no_further_segments() -> None:
    shallow = compile_model(build_toy("llama"), "eager", verify="capture")
    deep = compile_model(build_toy("llama", layers=5), "eager", verify="capture")
    assert shallow.manifest["num_segments"] == deep.manifest["num_segments"] == 4
    assert set(shallow.artifact.program.segment_keys) == set(deep.artifact.program.segment_keys)


@pytest.mark.slow
def test_a_deeper_model_needs_no_further_compiles() -> None:
    shallow = compile_model(build_toy("llama"), "inductor", dtype="float32")
    deep = compile_model(build_toy("llama", layers=5), "inductor", dtype="float32")
    assert shallow.manifest["num_segments"] == deep.manifest["num_segments"] == 4
    assert set(shallow.artifact.program.segment_keys) == set(deep.artifact.program.segment_keys)
    # The shallow one's packages are in the cache by now, and serve every layer of the deep one.
    assert deep.manifest["target"]["num_compiled"] == 0
    assert deep.manifest["errors"]["engine"] <= 1e-4


def test_every_pass_is_checked_on_request() -> None:
    engine = compile_model(build_toy("gemma2"), "eager", dtype="float32", verify="pass")
    errors = {report["name"]: report["error"] for report in engine.manifest["passes"]}
    assert list(errors) == [one.name for one in PASSES]
    assert all(error is not None and error <= 1e-4 for error in errors.values())
