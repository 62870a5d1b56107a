"""The command line as a user meets it: exit status, JSON, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from inlay.cli import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "engine"
    assert main(["build", "demo", "-o", str(path), "--backend", "eager"]) == 0
    return path


def test_run_streams_text_and_then_says_how_fast(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(artifact), "-p", "A list is", "--max-tokens", "5", "--temperature", "0"]
    assert main(arguments) == 0
    streamed = capsys.readouterr()
    assert "TTFT" in streamed.err
    assert "GB/s limit" in streamed.err
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"]
    assert facts["texts"] == [streamed.out.removesuffix("\n")]
    assert facts["metrics"][0]["output_tokens"] == 5
    assert facts["metrics"][0]["bandwidth_share"] > 0


def test_inspect_shows_what_the_artifact_holds(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact), "--json", "--check-weights"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "llama"
    assert facts["attention_layers"] == 4
    assert (
        sum(one["uses"] for one in facts["segments"].values()) == 6
    )  # first, three middles, tail, LM head
    assert len(facts["segments"]) == 4
    assert main(["inspect", str(artifact)]) == 0
    assert "fuse_rope" in capsys.readouterr().out


def test_demo_is_well_only_when_the_tokens_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--backend", "eager", "--max-tokens", "3", "--json"]
    assert main(arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_equal"] == facts["num_tokens"] == 18

    from tests.toys import build_toy

    other = build_toy("llama", vocab_size=4096)  # not the model that was compiled
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", _after(1, other))
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def _after(calls: int, other: object) -> object:
    """from_pretrained as it is for the first calls, another model from then on."""
    real = AutoModelForCausalLM.from_pretrained
    left = [calls]

    def load(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        return real(*args, **kwargs) if left[0] >= 0 else other

    return load


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "no/such/place/here", "-o", "x"], "not a directory"),
        (["build", "demo", "-o", "x", "--dtype", "int3"], "dtype must be one of"),
        (["build", "demo", "-o", "x", "--max-seq-len", "99999"], "max_position_embeddings"),
        (["inspect", "."], "is not an Inlay artifact"),
        (["run", "demo", "-p", "x", "--backend", "eager", "--top-p", "2"], "top_p"),
    ],
)
def test_faults_of_the_user_end_with_status_1_and_a_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert json.loads(said.out)["ok"] is False
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_message_names_what_to_install(tmp_path: Path) -> None:
    code = "import sys; from inlay.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "build", "demo", "-o", str(tmp_path / "engine")],
        env={"PATH": "", "HOME": str(tmp_path), "INLAY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "needs a C++ compiler" in done.stderr
    assert "backend='eager' needs none" in done.stderr
    assert not (tmp_path / "engine").exists()
