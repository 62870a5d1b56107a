"""`inlay cache`: what is listed, what is freed, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay import compile_model
from inlay.backends.cache import building, keep
from inlay.cli import main
from tests.toys import build_toy


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / "cache"))
    for kind, name in (("segments", "aaa.pt2"), ("ops", "lib.so")):
        with building(tmp_path / "cache" / kind) as scratch:
            (scratch / "file").write_bytes(b"x" * 1_500_000)
            facts = {"origin": "demo", "segment": "first"}
            keep(scratch / "file", tmp_path / "cache" / kind / name, facts)
    return tmp_path / "cache"


def call(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["cache", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ls_and_clear_by_kind(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = call(capsys, "ls")
    assert facts["path"] == str(cache)
    assert facts["total_bytes"] == 3_000_000
    assert [(e["kind"], e["origin"]) for e in facts["entries"]] == [
        ("segments", "demo: segment first"),
        ("ops", "demo: segment first"),
    ]
    assert call(capsys, "clear", "--older-than", "1") == {
        "ok": True, "path": str(cache), "freed_bytes": 0, "removed": [], "kept": []
    }  # fmt: skip
    assert call(capsys, "clear", "--kind", "ops")["freed_bytes"] == 1_500_000
    assert main(["cache", "ls"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith("segments    1.5 MB  unused for ")
    assert said[0].endswith("demo: segment first")
    assert said[1] == f"1 entries, 1.5 MB in {cache}"
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "1 entries removed, 1.5 MB freed\n"
    assert call(capsys, "ls")["entries"] == []


def test_an_engine_that_is_in_use_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = compile_model(build_toy("llama", layers=1), "eager")
    facts = call(capsys, "clear")
    assert [entry["kind"] for entry in facts["removed"]] == ["segments", "ops"]
    assert [entry["kind"] for entry in facts["kept"]] == ["staging"]
    assert engine.load_model() is not None
    assert main(["cache", "clear"]) == 0
    assert "kept, in use by process" in capsys.readouterr().out
    del engine
    assert call(capsys, "ls")["entries"] == []


def test_a_cache_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / "nowhere"))
    assert call(capsys, "ls")["total_bytes"] == 0
    assert call(capsys, "clear")["removed"] == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "words", [["rm"], ["ls", "--kind", "wheels"], ["clear", "--older-than", "-1"], []]
)
def test_wrong_words(words: list[str], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cache", *words])
    assert ended.value.code == 2
    assert "usage: inlay cache" in capsys.readouterr().err
    assert len(list(cache.rglob("*.so"))) == 1
