"""`inlay verify` as a user meets it: exit status, JSON, what it prints."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay.backends.eager.backend import EagerBackend
from inlay.backends.select import BACKENDS
from inlay.backends.tensorrt.backend import TensorRTBackend
from inlay.cli import main
from inlay.cli.verify import _take_own
from inlay.engine import build
from inlay.errors import BuildError, OptionError
from inlay.lowering.options import CompileOptions
from inlay.verify.backends import for_backend
from inlay.verify.source import random_source, with_layers
from tests.toys import build_toy

FEW = ["--backend", "eager", "--num-prompts", "3", "--max-tokens", "4", "--max-seq-len", "48"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of a small gemma2 and nothing else."""
    directory = tmp_path_factory.mktemp("config")
    build_toy("gemma2").config.save_pretrained(directory)
    return directory / "config.json"


def test_a_model_that_agrees_ends_with_status_0(config: Path) -> None:
    command = [sys.executable, "-m", "inlay.cli", "verify", str(config), "--random-weights", *FEW]
    done = subprocess.run(
        [*command, "--dtype", "float32", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    assert facts["ok"] is True
    assert facts["faults"] == []
    assert facts["finding"] is None
    assert facts["num_tokens"] == facts["measured"]["tokens"]["num_equal"] == 12
    assert facts["measured"]["tokens"]["num_wrong"] == 0
    assert 0 < facts["measured"]["ours"]["rms"] < 1e-5  # sums in another order
    assert facts["prompt_lengths"] == sorted([1, 7, 44], key=facts["prompt_lengths"].index)
    assert len(facts["layers"]) == 3
    assert "comparing with Hugging Face" in done.stderr


def test_an_artifact_of_other_weights_ends_with_status_1(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CompileOptions(backend="eager", dtype="float32", max_seq_len=48, block_size=16)
    build(random_source(str(config), "float32", seed=1).model, tmp_path / "engine", options)
    arguments = ["verify", str(config), "--random-weights", "--artifact", str(tmp_path / "engine")]
    assert main([*arguments, *FEW]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "DISAGREES"
    assert any("graph or weights in the artifact are wrong" in line for line in said)
    assert any(line.startswith("  source: File") for line in said)
    # Of the same weights it agrees: seed 1 made it.
    assert main([*arguments, *FEW, "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "AGREES"


def test_prompts_go_through_the_models_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["-p", "A list is", "-p", "The for statement is used to"]
    assert main(["verify", "demo", "--json", *FEW, *prompts]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["prompt_lengths"]) == 2
    assert facts["num_tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/place/here"], "not a directory"),
        (["no-such-type", "--random-weights"], "has no config that can be read"),
        (["demo", "--layers", "1"], "--layers needs --random-weights"),
        (["demo", "--random-weights", "--layers", "9"], "layers must be from 1 to"),
        (["some/config.json"], "is a config: verify it with --random-weights"),
        (["demo", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["demo", "--dtype", "int3"], "dtype must be one of"),
        (["demo", "--random-weights", "-p", "x", "--backend", "eager"], "needs a tokenizer"),
    ],
)
def test_what_cannot_be_verified_ends_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments, "--json"]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert json.loads(said.out)["ok"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "foo"}, "cannot be built from its config: KeyError: 'foo'"),
        ({"num_attention_heads": 0, "head_dim": None}, "has no config that can be read"),
    ],
)
def test_a_config_that_is_wrong(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_toy("llama", layers=1).config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert main(["verify", str(tmp_path), "--random-weights", "--backend", "eager"]) == 2
    assert message in capsys.readouterr().err


class Second(EagerBackend):
    """Another backend than eager, as far as anybody can tell."""

    name = "second"


def test_several_backends_in_one_table(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "second", f"{__name__}:Second")
    few = [*FEW[2:], "--dtype", "float32", "--backends", "eager,second,eager"]
    arguments = ["verify", str(config), "--random-weights", *few]
    assert main(arguments) == 0
    said = capsys.readouterr()
    check_table(said.out, "eager", "second")
    assert "  eager: generating 4 tokens" in said.err

    def refuses(*_: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(Second, "check", refuses)
    assert main([*arguments, "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    one, other = facts["backends"]
    assert (facts["ok"], one["ok"], one["top_1_agreement"]) == (False, True, 1.0)
    assert one["measured"]["num_greedy"] == 3
    assert other == {"backend": "second", "ok": None, "error": "BuildError: no compiler"}


def check_table(text: str, *backends: str) -> None:
    head, names, *rows = text.splitlines()
    assert head.endswith("float32, against Hugging Face in float32")
    assert names.split()[:3] == ["backend", "greedy", "top-1"]
    for line, name in zip(rows, backends, strict=True):
        assert line.split()[:5] == [name, "3", "of", "3", "100.00%"]
        assert line.split()[-1] == "agrees"
        assert 0 < float(line.split()[5]) < 1e-3  # the largest logit's difference


@pytest.mark.slow
def test_compiled_code_in_the_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [*FEW[2:], "--dtype", "float32", "--backends", "inductor,eager"]
    assert main(["verify", str(config), "--random-weights", *few]) == 0
    check_table(capsys.readouterr().out, "inductor", "eager")


def test_one_backend_that_is_wrong_gives_status_1_and_its_first_difference(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CompileOptions(backend="eager", dtype="float32", max_seq_len=48, block_size=16)
    build(random_source(str(config), "float32", seed=1).model, tmp_path / "engine", options)
    arguments = ["verify", str(config), "--random-weights", "--artifact", str(tmp_path / "engine")]
    # Compiled code is not in this artifact: one row says so, the other what is wrong.
    assert main([*arguments, *FEW, "--backends", "eager,inductor"]) == 1
    said = capsys.readouterr().out
    assert "DISAGREES" in said
    assert "eager: first difference: segment " in said
    assert "  node: " in said
    assert "inductor: not run: OptionError: backend must be one of eager" in said
    assert main(["verify", "demo", *FEW, "--backends", "eager,magic"]) == 2
    assert "tensorrt, eager, got 'magic'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_cannot_run_here_is_not_built_to_be_verified(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TensorRTBackend, "build", None)
    few = [*FEW[2:], "--dtype", "float16", "--backends", "eager,tensorrt", "--target", "sm89"]
    assert main(["verify", str(config), "--random-weights", *few]) == 2
    said = capsys.readouterr().out
    assert "tensorrt: not run: BuildError: TensorRT engines need a GPU to run" in said


def test_an_artifact_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers in (1, 2):
        build_toy("llama", layers=layers).save_pretrained(tmp_path / f"model-{layers}")
    artifact = str(tmp_path / "artifact")
    build = ["build", str(tmp_path / "model-2"), "-o", artifact, "--backend", "eager"]
    assert main(build) == 0
    assert main(["verify", str(tmp_path / "model-1"), "--artifact", artifact]) == 2
    assert "another model than" in (said := capsys.readouterr().err)
    assert "its num_hidden_layers is 2, the model's 1" in said


def test_an_artifact_of_another_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose config has the same sizes."""
    for name in ("llama", "qwen3"):
        build_toy(name, layers=1).save_pretrained(tmp_path / name)
    artifact = str(tmp_path / "artifact")
    assert main(["build", str(tmp_path / "llama"), "-o", artifact, "--backend", "eager"]) == 0
    assert main(["verify", str(tmp_path / "qwen3"), "--artifact", artifact]) == 2
    assert "its model_type is llama, the model's qwen3" in capsys.readouterr().err


def test_a_fault_of_ours_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("inlay.verify.verify_model", fails)
    assert main(["verify", "demo"]) == 2


def test_a_shallower_model_keeps_every_kind_of_layer() -> None:
    config = build_toy("gemma2", num_hidden_layers=6).config
    assert len(set(config.layer_types)) == 2
    config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    shallow = with_layers(config, 2)
    assert shallow.num_hidden_layers == 2
    assert shallow.layer_types == ["sliding_attention", "full_attention"]
    with pytest.raises(OptionError, match="from 1 to the model's 2"):
        with_layers(shallow, 3)


def test_options_of_one_backend_beside_others(capsys: pytest.CaptureFixture[str]) -> None:
    """--backends eager,tensorrt --device cpu --target sm89 is no reason to refuse either."""
    given = argparse.Namespace(target="sm89", device="cpu", library="auto", backend="inductor")
    own = _take_own(given)
    assert own == {"target": "sm89", "device": "cpu"}
    assert (given.target, given.device) == ("auto", "auto")
    options = CompileOptions(dtype="float16")
    tensorrt, eager = (for_backend(options, name, own) for name in ("tensorrt", "eager"))
    assert (tensorrt.target, tensorrt.device, tensorrt.dtype) == ("sm89", "auto", "float16")
    assert (eager.target, eager.device, eager.dtype) == ("auto", "cpu", "float16")
    for flags in (["--target", "sm89"], ["--whole"]):
        assert main(["verify", "demo", *FEW, "--backends", "eager,inductor", *flags]) == 2
        said = capsys.readouterr().err
        assert "which is not among backends eager, inductor: leave it out" in said
