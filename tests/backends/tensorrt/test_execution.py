"""The host's side of running engines, on engines that interpret their graphs on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inlay.backends.artifact import Artifact
from inlay.backends.eager.backend import EagerBackend
from inlay.backends.model import ProgramModel
from inlay.backends.step import StepRequest, build_step
from inlay.backends.tensorrt import fallback
from inlay.backends.tensorrt.backend import engine_calls, program_model, warm_up
from inlay.backends.tensorrt.execution import DECODE, PREFILL, EngineCall, Session
from inlay.backends.tensorrt.self_check import check_engines, tolerance
from inlay.engine import build
from inlay.errors import ArtifactError, OptionError
from inlay.lowering.options import CompileOptions
from tests.backends.tensorrt.fake_library import (
    CLASSES,
    DECODE_TOKENS,
    OWN,
    fake_library,
    fake_module,
    recorded_names,
    write_plans,
)
from tests.toys import build_toy

CPU = torch.device("cpu")
BLOCK_SIZE = 16
PROMPT = torch.randint(0, 128, (21,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """gemma2's graphs, opened as if engines had been built of them: two KV groups."""
    options = CompileOptions(
        backend="eager", dtype="float32", block_size=BLOCK_SIZE, verify="capture",
        max_num_tokens=64, max_num_seqs=DECODE_TOKENS,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("engines") / "engine"
    artifact = build(build_toy("gemma2"), path, options).artifact
    artifact.manifest["target"] = {"on_inductor": {}}
    return artifact


def session(folder: Path) -> Session:
    return Session(fake_library(), CPU, folder / "kernels")


def calls_of(artifact: Artifact, folder: Path, wrong: int | None = None) -> dict[int, EngineCall]:
    write_plans(artifact, wrong)
    return engine_calls(artifact, session(folder))


def logits(model: ProgramModel, begin: int, end: int) -> torch.Tensor:
    requests = [StepRequest(PROMPT[begin:end], begin, [[5, 1], [0, 3]])]
    return model.forward(build_step(requests, BLOCK_SIZE))[0]


def runs(call: EngineCall) -> list[int]:
    return call._contexts[0]._engine.runs


def test_the_fake_has_only_what_is_recorded_of_tensorrt_11() -> None:
    names = recorded_names()
    for cls in CLASSES:
        public = {name for name in vars(cls) if not name.startswith("_")}
        for name in public - OWN.get(cls.__name__, set()):
            assert f"{cls.__name__}.{name}" in names
    for name, value in vars(fake_module()).items():
        assert name in names
        if not isinstance(value, type | str):
            assert {f"{name}.{member}" for member in vars(value)} <= names


def test_steps_are_those_of_the_eager_model(artifact: Artifact, tmp_path: Path) -> None:
    calls = calls_of(artifact, tmp_path)
    engines, eager = program_model(artifact, calls, CPU), EagerBackend().load(artifact)
    for model in (engines, eager):
        model.allocate_kv_cache(6)
    for begin, end in ((0, 17), (17, 18), (18, 21)):
        expected, got = logits(eager, begin, end), logits(engines, begin, end)
        # Attention sums in another order; the rest is the same code.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert runs(calls[0]) == [PREFILL, DECODE, DECODE]
    assert all(not weights for _, _, weights, _ in engines._plan if weights is not None)


def test_engines_are_their_own_steps(artifact: Artifact, tmp_path: Path) -> None:
    """Segments are shared between steps, engines are not: each holds its step's weights."""
    calls = calls_of(artifact, tmp_path)
    model = program_model(artifact, calls, CPU)
    assert len(calls) == len(model.program.segment_keys) > len(artifact.program.segment_keys)


def test_batch_invariance_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    model = program_model(artifact, calls_of(artifact, tmp_path), CPU)
    with pytest.raises(OptionError, match="tensorrt"):
        model.make_batch_invariant()


def test_inputs_with_gaps_are_ours_to_avoid(artifact: Artifact, tmp_path: Path) -> None:
    call = calls_of(artifact, tmp_path)[0]
    row = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(AssertionError, match="gaps"):
        call([row, torch.zeros(4, 2, dtype=torch.int64)[:, 0][None]])


def test_every_decode_size_is_warmed_up(artifact: Artifact, tmp_path: Path) -> None:
    calls = calls_of(artifact, tmp_path)
    warm_up(artifact, calls, CPU)
    assert all(runs(call) == [DECODE, DECODE] for call in calls.values())  # 2 and 4 tokens


def test_a_damaged_plan_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    plan = tmp_path / "step-0.plan"
    plan.write_bytes(b"no plan")
    with pytest.raises(ArtifactError, match=r"step-0\.plan cannot be loaded"):
        session(tmp_path).load(plan, [])


def test_good_engines_pass_and_are_not_checked_again(artifact: Artifact, tmp_path: Path) -> None:
    calls, verdict = calls_of(artifact, tmp_path), tmp_path / "cache" / "verdict.json"
    check_engines(artifact, calls, CPU, verdict)
    assert set(json.loads(verdict.read_text())["errors"]) == {str(index) for index in calls}
    before = len(runs(calls[0]))
    check_engines(artifact, calls, CPU, verdict)
    assert len(runs(calls[0])) == before > 0


def test_a_cache_that_cannot_be_written_costs_time_alone(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    check_engines(artifact, calls_of(artifact, tmp_path), CPU, blocked / "verdict.json")
    assert "verdict.json is not kept in the cache" in caplog.text
    assert "verdict.json in the cache cannot be read" in caplog.text


@pytest.mark.parametrize("which", [0, -1])
def test_a_wrong_engine_is_refused_by_name(artifact: Artifact, tmp_path: Path, which: int) -> None:
    steps = sorted(calls_of(artifact, tmp_path))
    calls, verdict = calls_of(artifact, tmp_path, steps[which]), tmp_path / "verdict.json"
    with pytest.raises(ArtifactError, match=f"1 of {len(steps)} steps .* is step {steps[which]},"):
        check_engines(artifact, calls, CPU, verdict)
    assert not verdict.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_checks_tolerance_tells_a_wrong_scale(dtype: torch.dtype) -> None:
    """A twentieth too much is the least that the twins of tests/twins.py change by."""
    assert torch.finfo(dtype).eps < tolerance(dtype) < 0.07


def test_what_inductor_runs_instead(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, not compiled: that is Inductor's own matter."""
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    key = artifact.program.segment_keys[0]
    write_plans(artifact)
    artifact.manifest["target"] = {"on_inductor": {key: ["a reason"]}}
    try:
        calls = engine_calls(artifact, session(tmp_path))
        mixed = program_model(artifact, calls, CPU)
    finally:
        artifact.manifest["target"] = {"on_inductor": {}}
    eager = EagerBackend().load(artifact)
    for model in (mixed, eager):
        model.allocate_kv_cache(6)
    # As above: attention sums in another order.
    torch.testing.assert_close(logits(mixed, 0, 9), logits(eager, 0, 9), rtol=1e-4, atol=1e-4)
    assert 0 not in calls
    assert fallback.REFERENCES
