"""`verify_model` agrees with right engines, and finds and names each fault planted in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from inlay.backends.artifact import MANIFEST, SELF, Artifact, hash_files, write_json, write_manifest
from inlay.backends.eager import backend as eager
from inlay.backends.inductor.backend import PACKAGE
from inlay.engine import Engine, build, compile_model
from inlay.lowering.loading import Source
from inlay.lowering.options import CompileOptions
from inlay.passes import pass_manager
from inlay.passes.graph import calls, insert_call
from inlay.passes.pass_manager import Pass, run_passes
from inlay.runtime import batch
from inlay.verify import Report, verify_model
from inlay.verify.report import max_ratio
from inlay.verify.text import lines
from tests.toys import build_toy

OPTIONS = CompileOptions(backend="eager", dtype="float32", block_size=16, verify="capture")
SHORT = replace(OPTIONS, max_seq_len=64)
ops = torch.ops.inlay


def verify(name: str = "llama", engine: Engine | None = None, **options: Any) -> Report:
    """A short run; the engines that faults are planted in take 64 tokens."""
    model = build_toy(name, getattr(torch, options.get("dtype", "float32")))
    return verify_model(
        Source(model, None, name),
        replace(OPTIONS, **options),
        engine=engine,
        num_prompts=5,
        max_tokens=8,
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right artifact, to be copied and damaged."""
    path = tmp_path_factory.mktemp("sound") / "engine"
    build(build_toy("llama"), path, SHORT)
    return path


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "engine"))


def seal(path: Path) -> Engine:
    """Open an artifact whose files were changed, as if it had been built that way."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest[SELF]
    write_manifest(path, {**manifest, "files": hash_files(path)})
    return Engine(Artifact(path))


# --- agreement -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", ["model.layers.0", "lm_head's input"]),
        ("gemma2", ["model.layers.0", "model.layers.1", "lm_head's input"]),
        ("gpt2", ["transformer.h.0", "transformer.h.1", "lm_head's input"]),
    ],
)
def test_a_right_engine_agrees_layer_by_layer(name: str, layers: list[str]) -> None:
    report = verify(name)
    assert report.ok
    assert report.finding is None
    assert report.measured is not None
    assert report.measured.hugging_face is None
    assert 0 < report.measured.ours.rms < 1e-5
    assert report.num_tokens == report.measured.tokens.num_tokens == 40
    assert [row.name for row in report.layers] == layers
    # Sums in another order, nothing else; a wrong node is off by more than 0.1.
    assert all(row.ours < 1e-5 and row.seen_in == "engine" for row in report.layers)
    assert min(report.prompt_lengths) == 1
    assert max(report.prompt_lengths) > 200
    assert list(lines(report))[-1] == "AGREES"


def test_bfloat16_is_judged_by_hugging_face_in_bfloat16() -> None:
    report = verify(dtype="bfloat16")
    assert report.measured is not None
    ours, theirs = report.measured.ours, report.measured.hugging_face
    assert theirs is not None
    assert report.ok
    assert 1e-3 < ours.rms <= 1.25 * theirs.rms
    assert 0 < ours.kl_mean <= 1.25 * theirs.kl_mean
    assert all(row.hugging_face is not None for row in report.layers)
    allowed = max_ratio(report.num_tokens)
    assert any(f"(allowed {allowed})" in line for line in lines(report))


def test_inductor_agrees() -> None:
    report = verify(backend="inductor")
    assert report.ok
    assert report.backend == "inductor"
    assert {row.seen_in for row in report.layers} == {"engine"}


# --- faults ----------------------------------------------------------------------------------


def enlarge(gm: GraphModule) -> int:
    """A pass with a fault: the third linear layer's weight is multiplied."""
    node = calls(gm, ops.linear.default)[2]
    weight = node.args[1]
    larger = insert_call(gm.graph, node, torch.ops.aten.mul.Tensor, weight, 1.05)
    node.args = (node.args[0], larger, *node.args[2:])
    return 1


@pytest.fixture
def evil_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = list(pass_manager.PASSES)
    after = next(i for i, one in enumerate(passes) if one.name == "fuse_gemms") + 1
    evil = (*passes[:after], Pass("enlarge", enlarge), *passes[after:])
    monkeypatch.setattr(pass_manager, "PASSES", evil)
    monkeypatch.setattr("inlay.lowering.pipeline.BEFORE_QUANTIZATION", evil[:-1])
    assert run_passes.__defaults__ is not None
    monkeypatch.setattr(run_passes, "__defaults__", (evil, *run_passes.__defaults__[1:]))


@pytest.mark.usefixtures("evil_pass")
def test_a_pass_that_multiplies_a_weight_is_named() -> None:
    report = verify(max_seq_len=64)
    assert not report.ok
    finding = report.finding
    assert finding is not None
    assert (finding.stage, finding.name) == ("pass", "enlarge")
    assert finding.node.startswith("linear")
    assert finding.module.startswith("model.layers.0.mlp")
    assert "modeling_llama.py" in finding.source
    assert "line" in finding.source
    assert finding.error is not None
    assert finding.error > 1e-3
    assert list(lines(report))[-1] == "DISAGREES"


@pytest.fixture
def wrong_attention() -> Iterator[None]:
    """Capture emits attention with a scale that is 10 % off."""
    verify_once = build_toy("llama", layers=1)
    compile_model(verify_once, "eager", verify="capture")  # registers the right one
    right: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["inlay"]

    def wrong(module: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        return right(module, *args, scaling=1.1 * scaling, **kwargs)

    AttentionInterface.register("inlay", wrong)
    yield
    AttentionInterface.register("inlay", right)


@pytest.mark.usefixtures("wrong_attention")
def test_a_fault_of_capture_is_said_to_be_one() -> None:
    report = verify()
    assert not report.ok
    assert report.measured is None
    assert report.finding is not None
    assert report.finding.stage == "capture"
    assert report.finding.what.startswith("the captured graph already differs")
    # The first module that ends with wrong values; o_proj ends before self_attn does.
    assert report.finding.module == "model.layers.0.self_attn.o_proj"
    assert [row.seen_in for row in report.layers] == ["capture"] * 2
    assert min(row.ours for row in report.layers) > 1e-3


def test_a_wrong_constant_in_a_segments_graph_is_found(damaged: Path) -> None:
    program = Artifact(damaged).program
    key = program.segment_steps[1].segment
    file = damaged / "segments" / key / "graph.json"
    graph = json.loads(file.read_text())
    norm = next(node for node in graph["nodes"] if node["op"].startswith("inlay.add_rms_norm"))
    norm["args"] = [0.5 if isinstance(arg, float) and arg else arg for arg in norm["args"]]
    write_json(file, graph)
    report = verify(engine=seal(damaged))
    assert not report.ok
    finding = report.finding
    assert finding is not None
    assert (finding.stage, finding.name) == ("segment", key)
    assert "graph or weights in the artifact" in finding.what
    assert finding.node.startswith("add_rms_norm")
    assert finding.module == "model.layers.0.post_attention_layernorm"


def test_a_wrong_weight_is_found_where_it_is_read(damaged: Path) -> None:
    index = json.loads((damaged / "weights" / "index.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    file = damaged / "weights" / index[name]["file"]
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, file)
    finding = verify(engine=seal(damaged)).finding
    assert finding is not None
    assert finding.stage == "segment"
    assert finding.module == "model.layers.1.mlp.down_proj"


def test_a_wrong_scale_of_attention_is_found(damaged: Path) -> None:
    file = damaged / "program.json"
    program = json.loads(file.read_text())
    step = [step for step in program["steps"] if step["kind"] == "attention"][1]
    step["scale"] *= 1.1
    write_json(file, program)
    finding = verify(engine=seal(damaged)).finding
    assert finding is not None
    assert (finding.stage, finding.name) == ("attention", "1")
    assert "scale is 0.275 where the graph has 0.25" in finding.what
    assert finding.module == "model.layers.1.self_attn"


def test_code_that_a_backend_compiles_wrongly_is_found(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            result = super().call_function(target, args, kwargs)
            return 1.05 * result if target is ops.rope.default else result

    monkeypatch.setattr(eager, "interpret", lambda gm: lambda args: Wrong(gm).run(*args))
    finding = verify(engine=Engine.load(sound)).finding
    assert finding is not None
    assert finding.stage == "segment"
    assert "that eager compiles wrongly" in finding.what
    assert finding.node.startswith("rope")
    assert finding.module.startswith("model.layers.0.self_attn")


@pytest.mark.slow
def test_code_of_another_graph_is_found(tmp_path: Path) -> None:
    """The graph is right, the package is not."""
    options = replace(SHORT, backend="inductor")
    right = build(build_toy("llama"), tmp_path / "right", options)
    other = build(build_toy("llama", rms_norm_eps=0.5), tmp_path / "other", options)
    keys = [engine.artifact.program.segment_steps[1].segment for engine in (right, other)]
    assert keys[0] != keys[1]
    place = right.path / "segments" / keys[0] / PACKAGE
    shutil.copyfile(other.path / "segments" / keys[1] / PACKAGE, place)
    finding = verify(engine=seal(right.path), backend="inductor").finding
    assert finding is not None
    assert (finding.stage, finding.name) == ("segment", keys[0])
    assert "rightly as soon as its intermediate values are asked for" in finding.what


def test_wrong_inputs_are_not_blamed_on_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch.build_step

    def wrong(*args: Any, **kwargs: Any) -> Any:
        step = right(*args, **kwargs)
        return replace(step, position_ids=step.position_ids // 2)

    monkeypatch.setattr(batch, "build_step", wrong)
    report = verify(max_seq_len=64)
    assert not report.ok
    assert report.finding is not None
    assert report.finding.stage == ""
    assert "what the runtime asks of it is wrong" in report.finding.what
