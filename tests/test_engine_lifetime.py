"""What happens around an engine's directory: forks, moves, links, odd places."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inlay import LLM, Engine, SamplingParams, compile_model
from inlay.errors import ArtifactError, BuildError, RequestError
from tests.toys import build_toy


@pytest.fixture(scope="module")
def engine() -> Engine:
    return compile_model(build_toy("llama", layers=1), "eager")


def test_a_forked_child_leaves_the_engine_alone(engine: Engine) -> None:
    child = os.fork()
    if child == 0:
        del engine
        import atexit

        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    assert (engine.path / "inlay.json").is_file()


def test_a_moved_artifact_is_said_to_be_gone(engine: Engine, tmp_path: Path) -> None:
    opened = engine.save(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    for use in (opened.load_model, opened.tokenizer, lambda: opened.save(tmp_path / "copy")):
        with pytest.raises(ArtifactError, match="is gone"):
            use()
    assert not (tmp_path / "copy").exists()
    assert Engine.load(tmp_path / "after").load_model() is not None


def test_a_link_to_a_directory_stays_a_link(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    engine.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "inlay.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_working_directory_is_not_replaced(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match="working directory"):
        engine.save(".")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", [b"abc", [b"abc"], bytearray(b"abc")])
def test_bytes_are_no_prompt(engine: Engine, prompt: object) -> None:
    with pytest.raises(RequestError):
        LLM(engine, in_process=True, kv_cache_tokens=64).generate(prompt, use_tqdm=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"top_k": 2**63}, {"temperature": 1e39}, {"temperature": 10**400}]
)
def test_sampling_values_that_do_not_fit_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [5, iter([SamplingParams()]), {"top_k": 1}])
def test_other_things_are_no_sampling_params(engine: Engine, params: object) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        LLM(engine, in_process=True, kv_cache_tokens=64).generate([1, 2], params, use_tqdm=False)  # type: ignore[arg-type]
