"""`inlay inspect` as a user meets it: a page, text or JSON; status and messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inlay.cli import main
from inlay.errors import VerificationError
from inlay.report import collect
from tests.toys import build_toy

RATES = ["--bandwidth", "25", "--flops", "200"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inspect") / "llama"
    build_toy("llama", layers=1).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def artifact(toy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inspect") / "engine"
    arguments = ["build", toy, "-o", str(path), "--backend", "eager", "--verify", "capture"]
    assert main(arguments) == 0
    return str(path)


def test_the_demo_as_a_process(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "inlay.cli", "inspect", "demo", "-o", str(page)]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{page}\n")
    assert "pass fuse_rope: 8 matches" in done.stderr
    html = page.read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert html.count("<svg") == 3
    assert "Measured on the machine that wrote this page" in html
    assert len(html) < 300_000


@pytest.mark.parametrize("flag", ["--whole", "--target=sm89", "--fallback=inductor"])
def test_options_of_one_backend_are_not_offered(
    toy: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", toy, flag])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_model_as_text_and_json(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", toy, "--dtype", "float32", "--max-seq-len", "100"]) == 0
    text = capsys.readouterr().out
    assert f"{toy}: llama, float32" in text
    assert "fuse_rope                2 of 2 in " in text
    assert "prefill, 100 tokens: " in text
    assert main(["inspect", toy, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["ok"]
    norms = next(one for one in facts["passes"] if one["name"] == "fuse_rms_norm")
    assert norms["ops_after"]["inlay.rms_norm"] == 3
    assert facts["costs"][0]["flops"] == sum(
        facts["costs"][0][name] for name in ("product_flops", "attention_flops")
    )
    assert "pass " not in said.err


def test_an_artifact_keeps_its_text_and_gets_a_page(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", artifact]) == 0
    assert "  phases, s: load " in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["inspect", artifact, "-o", str(page), "--check-weights", *RATES]) == 0
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "no picture of the layer\nbefore the passes" in html
    assert "memory 25 GB/s, matrix products 200 GFLOP/s" in html


def test_a_failure_is_status_1_and_written(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: object, **kwargs: object) -> None:
        raise VerificationError("pass canonicalise changed the <outputs>")

    monkeypatch.setattr(collect, "run_passes", wrong)
    page = tmp_path / "report.html"
    assert main(["inspect", toy, "-o", str(page), "--json", *RATES]) == 1
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert (facts["ok"], facts["error"]) == (False, "VerificationError")
    assert "pass canonicalise changed the <outputs>" in said.err
    html = page.read_text()
    assert "changed the &lt;outputs&gt;" in html
    assert html.index("Failed: pass canonicalise") < html.index("<main>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/place/here"], "not a directory, a hub id"),
        (["."], "is not an Inlay artifact (it has no inlay.json) and not a Hugging Face model"),
        (["demo", "-o", "."], "output must be a file, and . is a directory"),
        (["demo", "-o", "no/such/report.html"], "lies in a directory that does not exist"),
        (["demo", "--bandwidth", "0"], "--bandwidth must be a positive number, got 0.0"),
        (["demo", "--flops", "nan"], "--flops must be a positive number, got nan"),
        (["demo", "--dtype", "int3"], "dtype must be one of"),
        (["demo", "--check-weights"], "--check-weights is for artifacts"),
    ],
)
def test_bad_input_is_status_1(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_an_artifact_does_not_allow(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", artifact, "-o", f"{artifact}/report.html"]) == 1
    assert "lies in the artifact" in capsys.readouterr().err
    assert main(["inspect", artifact, "--dtype", "bfloat16"]) == 1
    assert "dtype cannot be changed for the artifact" in capsys.readouterr().err
    assert main(["inspect", artifact]) == 0


def test_a_page_that_cannot_be_written(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", artifact, "-o", "/dev/full", *RATES]) == 1
    assert "output /dev/full cannot be written" in capsys.readouterr().err


def test_bad_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect"], ["inspect", "demo", "--flops", "fast"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "--flops: invalid float value" in capsys.readouterr().err


def test_what_an_artifact_holds(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", artifact, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["hashes"]["weights_checked"] is False
    roles = [one["role"] for one in facts["segments"].values()]
    assert roles == ["first", "tail", "LM head"]
    assert all(one["uses"] == 1 and one["ops"] > 0 for one in facts["segments"].values())
    held = sum(one["weight_bytes"] for one in facts["segments"].values())
    assert held <= facts["weight_bytes"] < held + 5000  # headers
    assert facts["code_bytes"] == 0  # eager has none
    assert 0 < facts["graph_bytes"] < facts["total_bytes"] - facts["weight_bytes"]
    assert facts["provenance"][0]["made_by"] == "build"
    assert facts["quantization"] == {
        "asked_for": "none", "given_by": [], "products": {"linear": 5},
    }  # fmt: skip
    assert main(["inspect", artifact, "--check-weights"]) == 0
    text = capsys.readouterr().out
    assert "inlay.json: all right\n" in text
    assert main(["inspect", artifact]) == 0
    assert "which --check-weights checks" in capsys.readouterr().out
