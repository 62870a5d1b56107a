"""`inlay prune` and `inlay refit` as a user meets them; and the tokens that come of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlay import LLM, Engine, SamplingParams
from inlay.cli import main
from inlay.lowering.random_weights import randomise
from tests.toys import build_toy

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(path: Path) -> list[list[int]]:
    with LLM(Engine.load(path), in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate([[5, 6, 7, 8], [100]], GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    build_toy("llama", layers=1).save_pretrained(folder / "first")
    randomise(build_toy("llama", layers=1), 5).save_pretrained(folder / "second")
    build_toy("llama", layers=1, rms_norm_eps=1e-3).save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_prune_and_refit_give_the_same_tokens(
    backend: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, pruned, made = (str(tmp_path / name) for name in ("engine", "pruned", "made"))
    first, second = str(checkpoints / "first"), str(checkpoints / "second")
    assert main(["build", first, "-o", engine, "--backend", backend, "--max-seq-len", "64"]) == 0
    capsys.readouterr()
    assert main(["prune", engine, "-o", pruned, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is True
    assert facts["bytes_after"] < facts["bytes_before"] - 100_000  # the toy's weights
    assert main(["refit", pruned, "--weights", first, "-o", made, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert [one["made_by"] for one in facts["provenance"]] == ["build", "prune", "refit"]
    assert set(facts["errors"]) == {"hugging_face", "capture", "engine"}
    assert "weights are those that were pruned" in said.err
    assert tokens(tmp_path / "made") == tokens(tmp_path / "engine")
    assert main(["refit", engine, "--weights", second, "-o", made]) == 0
    assert f"{made}: llama, float32, {backend}, refitted in" in capsys.readouterr().out
    assert tokens(tmp_path / "made") != tokens(tmp_path / "engine")
    if backend == "eager":
        return
    # The same code, not only code that does the same.
    assert main(["inspect", made, "--json"]) == 0
    other = Engine.load(engine).manifest["files"]
    kept = [n for n in other if n.startswith("segments/")]
    files = Engine.load(made).manifest["files"]
    assert all(files[name] == other[name] for name in kept)


def test_what_is_refused(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, pruned, made = (str(tmp_path / name) for name in ("engine", "pruned", "made"))
    build = ["build", str(checkpoints / "first"), "-o", engine, "--backend", "eager"]
    assert main([*build, "--verify", "capture"]) == 0
    assert main(["prune", engine, "-o", pruned]) == 0
    assert "before, 0." in capsys.readouterr().out
    for command in (["run", pruned, "-p", "x"], ["verify", "demo", "--artifact", pruned]):
        assert main(command) != 0
        capsys.readouterr()
    assert main(["inspect", pruned]) == 0
    assert "PRUNED: weights 0.0 MB" in capsys.readouterr().out
    assert main(["refit", pruned, "--weights", str(checkpoints / "other"), "-o", made]) == 1
    assert "its rms_norm_eps is 0.001 instead of 1e-06" in capsys.readouterr().err
    assert main(["refit", "demo", "--weights", "demo", "-o", made]) == 1
    assert "is not an Inlay artifact" in capsys.readouterr().err
    assert main(["prune", pruned, "-o", made]) == 1
    assert "is pruned already" in capsys.readouterr().err
    assert not Path(made).exists()
