"""`compile_model` and `Engine`: nothing of the user's is changed, nothing is left behind."""

from __future__ import annotations

import copy
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import PreTrainedModel

from inlay import LLM, CompileOptions, Engine, SamplingParams, compile_model
from inlay.engine import build, is_artifact
from inlay.errors import (
    ArtifactError,
    BuildError,
    InlayError,
    ModelLoadError,
    OptionError,
    UnsupportedModelError,
    VerificationError,
)
from inlay.passes.graph import calls
from inlay.passes.pass_manager import BEFORE_QUANTIZATION, PASSES
from tests.runtime.toy_tokenizers import byte_level
from tests.toys import build_toy

EAGER = CompileOptions(backend="eager", dtype="float32", block_size=16)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9], [100], list(range(40, 61))]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, to see what is left in it."""
    path = tmp_path / "cache"
    monkeypatch.setenv("INLAY_CACHE_DIR", str(path))
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("engine") / "engine"
    return build(build_toy("llama", layers=1), path, EAGER, tokenizer=byte_level())


def left_in(*folders: Path) -> list[Path]:
    """Files, and directories that hold nothing, below folders that may not exist."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [path for path in found if path.is_file() or path.name != "staging"]


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine, in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk, in whatever library it happens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- the user's model ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_users_model_is_not_changed(dtype: str) -> None:
    model = build_toy("gemma2", tie_word_embeddings=True).train()
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    generation = copy.deepcopy(model.generation_config.to_dict())
    parameters = list(model.parameters())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model.eval()(ids).logits
    model.train()
    engine = compile_model(model, "eager", dtype=dtype, verify="pass")
    assert engine.manifest["dtype"] == ("float32" if dtype == "auto" else dtype)
    assert model.training
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"  # what gemma2 chooses for itself
    assert model.generation_config.to_dict() == generation
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, before)


def test_weights_that_change_later_do_not_reach_the_engine() -> None:
    model = build_toy("llama", layers=1)
    engine = compile_model(model, "eager")
    expected = tokens(engine)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert tokens(engine) == expected


def test_generation_configs_that_contradict_themselves_are_kept() -> None:
    model = build_toy("llama", layers=1)
    model.generation_config.update(do_sample=False, temperature=0.5, eos_token_id=[3, 4])
    engine = compile_model(model, "eager", verify="capture")
    kept = engine.generation_config
    assert (kept["do_sample"], kept["temperature"], kept["eos_token_id"]) == (False, 0.5, [3, 4])


# --- verification ----------------------------------------------------------------------------


def test_every_pass_is_verified_on_request() -> None:
    model = build_toy("llama", layers=1)
    reports = compile_model(model, "eager", verify="pass").manifest["passes"]
    assert [report["name"] for report in reports] == [one.name for one in PASSES]
    assert all(0 <= report["error"] <= 1e-5 for report in reports)
    reports = compile_model(model, "eager", verify="engine").manifest["passes"]
    assert all(report["error"] is None for report in reports)


def sabotaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """fuse_rope does its work, and turns one sine around."""
    number = [one.name for one in BEFORE_QUANTIZATION].index("fuse_rope")
    real = BEFORE_QUANTIZATION[number]

    def run(gm: GraphModule) -> int:
        count = real.run(gm)
        node = calls(gm, torch.ops.inlay.rope.default)[0]
        with gm.graph.inserting_before(node):
            sine = gm.graph.call_function(torch.ops.aten.neg.default, (node.args[2],))
        sine.meta.update(node.args[2].meta)
        node.update_arg(2, sine)
        return count

    passes = list(BEFORE_QUANTIZATION)
    passes[number] = replace(real, run=run)
    monkeypatch.setattr("inlay.lowering.pipeline.BEFORE_QUANTIZATION", passes)


def test_a_pass_that_errs_is_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    sabotaged(monkeypatch)
    model = build_toy("llama", layers=1)
    with pytest.raises(VerificationError, match=r"pass fuse_rope changed the outputs: .*first at "):
        compile_model(model, "eager", verify="pass")
    with pytest.raises(VerificationError, match=r"the eager engine does not .*inlay verify` names"):
        compile_model(model, "eager")
    assert not left_in(cache)
    compile_model(model, "eager", verify="capture")  # which looks no further


# --- bad input -------------------------------------------------------------------------------


def patched() -> PreTrainedModel:
    model = build_toy("llama", layers=1)
    model.model.layers[0].mlp.forward = lambda x: x
    return model


def not_finite() -> PreTrainedModel:
    model = build_toy("llama", layers=1)
    model.lm_head.weight.data[0, 0] = torch.nan
    return model


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], type[InlayError]]] = {
    "backend": (lambda: "demo", {"backend": "tensorflow"}, OptionError),
    "option": (lambda: "demo", {"blocksize": 16}, OptionError),
    "value": (lambda: "demo", {"block_size": "16"}, OptionError),
    "beyond the positions": (lambda: "demo", {"max_seq_len": 1 << 20}, OptionError),
    "no tokenizer": (lambda: "demo", {"tokenizer": "/nowhere"}, OptionError),
    "place": (lambda: "/nowhere", {}, ModelLoadError),
    "hub": (lambda: "owner/name", {}, ModelLoadError),
    "nothing": (lambda: None, {}, UnsupportedModelError),
    "patched": (patched, {}, UnsupportedModelError),
    "not finite": (not_finite, {}, ModelLoadError),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_nothing_behind(case: str, cache: Path, engine: Engine) -> None:
    model, options, error = BAD[case]
    llm = LLM(engine, in_process=True, kv_cache_tokens=512)
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    given = {"backend": "eager", **options}
    with pytest.raises(error) as caught:
        compile_model(model(), **given)
    with pytest.raises(error) as also:
        LLM(model(), **given)
    assert str(caught.value) == str(also.value)
    assert not left_in(cache)
    again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in again] == [o.outputs[0].token_ids for o in expected]


def test_an_engine_is_no_model(engine: Engine) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers PreTrainedModel, got Engine"):
        compile_model(engine, "eager")
    with pytest.raises(ModelLoadError, match=r"has no config.json.*load it with Engine.load"):
        compile_model(engine.path, "eager")


# --- disks -----------------------------------------------------------------------------------


def test_a_full_disk_while_building(cache: Path, tmp_path: Path) -> None:
    model = build_toy("llama", layers=1)
    place = tmp_path / "place"
    with (
        pytest.raises(BuildError, match=r"could not write the artifact .*too large"),
        files_of_at_most(100_000),
    ):
        build(model, place / "engine", EAGER)
    with (
        pytest.raises(BuildError, match=r"could not write the artifact .*too large"),
        files_of_at_most(2_000),
    ):
        compile_model(model, "eager")
    assert not left_in(cache, place)
    assert compile_model(model, "eager", verify="capture").save(place / "engine").path.is_dir()


def test_a_full_disk_while_saving(engine: Engine, tmp_path: Path) -> None:
    target = tmp_path / "place" / "engine"
    with (
        pytest.raises(BuildError, match=f"could not write the artifact {target}: .*too large"),
        files_of_at_most(2_000),
    ):
        engine.save(target)
    assert not list(target.parent.iterdir())
    assert tokens(engine.save(target)) == tokens(engine)


@pytest.mark.parametrize("cache_dir", ["/proc/inlay", "file"])
def test_a_cache_that_cannot_be_written(
    cache_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / cache_dir))
    with pytest.raises(BuildError, match=r"cache .*staging cannot be written: .*INLAY_CACHE"):
        compile_model(build_toy("llama", layers=1), "eager")


def test_a_wrong_target_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(BuildError, match="exists and is not an Inlay artifact"):
            build("/nowhere", target, EAGER)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- saving and loading ----------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(engine: Engine, tmp_path: Path) -> None:
    saved = engine.save(tmp_path / "a" / "engine")
    loaded = Engine.load(str(saved.path), check_weights=True)
    assert loaded.manifest == engine.manifest
    assert is_artifact(saved.path)
    assert not is_artifact(tmp_path)
    assert tokens(loaded) == tokens(engine)
    assert loaded.model_config["model_type"] == "llama"
    assert loaded.tokenizer().encode("a fox") == byte_level().encode("a fox")
    assert repr(loaded) == f"Engine(llama, backend='eager', path='{saved.path}')"
    assert loaded.save(saved.path) is loaded


def test_what_is_compiled_in_memory_outlives_its_staging_place_once_saved(
    cache: Path, tmp_path: Path
) -> None:
    engine = compile_model(build_toy("llama", layers=1), "eager")
    staging = engine.path.parent
    assert staging.parent == cache / "staging"
    saved = engine.save(tmp_path / "engine")
    weights = next(saved.path.glob("weights/*.safetensors"))
    assert weights.stat().st_nlink == 2, "weights are linked, not copied"
    expected = tokens(engine)
    del engine
    gc.collect()
    assert not staging.exists()
    assert weights.stat().st_nlink == 1
    assert tokens(Engine.load(saved.path, check_weights=True)) == expected


def test_on_another_file_system_weights_are_copied(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_link)
    saved = engine.save(tmp_path / "engine")
    assert next(saved.path.glob("weights/*.safetensors")).stat().st_nlink == 1
    assert Engine.load(saved.path, check_weights=True).manifest == engine.manifest


def test_an_artifact_replaces_an_artifact(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "engine")
    other = build(build_toy("qwen2", layers=1), tmp_path / "other", EAGER)
    replaced = other.save(tmp_path / "engine")
    assert replaced.manifest["architecture"] == "qwen2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "other"]
    assert tokens(replaced) == tokens(other) != tokens(engine)
    with pytest.raises(BuildError, match="lies inside the artifact"):
        other.save(other.path / "copy")
    assert Engine.load(other.path).manifest == other.manifest


@pytest.mark.parametrize("harm", ["missing", "added"])
def test_what_was_damaged_since_replaces_nothing(harm: str, engine: Engine, tmp_path: Path) -> None:
    good = engine.save(tmp_path / "good")
    source = engine.save(tmp_path / "source")
    if harm == "missing":
        (source.path / "graph.json").unlink()
    else:
        (source.path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"graph.json is missing|notes.txt is not of this"):
        source.save(good.path)
    assert Engine.load(good.path, check_weights=True).manifest == engine.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "source"]


def test_threads_that_compile_at_once() -> None:
    models = [build_toy(name, layers=1) for name in ("llama", "qwen2", "llama")]
    with ThreadPoolExecutor(3) as pool:
        built = pool.map(lambda m: compile_model(m, "eager", verify="capture"), models)
        names = [engine.manifest["architecture"] for engine in built]
    assert names == ["llama", "qwen2", "llama"]
    assert compile_model(models[1], "eager").manifest["architecture"] == "qwen2"


def test_backends_that_an_artifact_does_not_have(engine: Engine) -> None:
    with pytest.raises(OptionError, match=r"backend must be one of eager for the artifact .*got"):
        Engine.load(engine.path, backend="inductor")
    with pytest.raises(OptionError, match=r"backend must be one of .*, eager, got 'magic'"):
        Engine.load(engine.path, backend="magic")
    with pytest.raises(ArtifactError, match="is not an Inlay artifact"):
        Engine.load(engine.path / "model")


def test_progress_tells_every_phase() -> None:
    lines: list[str] = []
    engine = compile_model(build_toy("llama", layers=1), "eager", progress=lines.append)
    phases = ["load", "capture", "passes", "partition", "backend check"]
    phases += ["weights", "compile", "verify"]
    assert [line.partition(":")[0] for line in lines] == phases
    assert list(engine.manifest["phases"]) == phases


BUILD = """
import sys
from inlay import CompileOptions
from inlay.engine import build
options = CompileOptions(backend="eager", dtype="float32", verify="capture")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(2):
    build(sys.argv[1], sys.argv[2], options)
"""


def test_two_processes_build_one_target(tmp_path: Path) -> None:
    build_toy("llama", layers=1).save_pretrained(tmp_path / "model")
    target = tmp_path / "place" / "engine"
    command = [sys.executable, "-c", BUILD, str(tmp_path / "model"), str(target)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    builders = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    errors = []
    for builder in builders:
        builder.stdin.write("\n")
        builder.stdin.flush()
    for builder in builders:
        errors.append(builder.communicate(timeout=120)[1])
    # The second is refused, unless it came when the first was done.
    statuses = sorted(builder.returncode for builder in builders)
    assert statuses in ([0, 0], [0, 1]), errors
    assert "is being written by process" in "".join(errors) or statuses == [0, 0]
    assert [path.name for path in target.parent.iterdir()] == ["engine"]
    assert Engine.load(target, check_weights=True).manifest["architecture"] == "llama"


def test_a_damaged_checkpoint_leaves_the_artifact_there(tmp_path: Path, engine: Engine) -> None:
    saved = engine.save(tmp_path / "engine")
    folder = tmp_path / "model"
    build_toy("llama", layers=1).save_pretrained(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelLoadError, match="damaged or truncated"):
        build(folder, saved.path, EAGER)
    assert Engine.load(saved.path, check_weights=True).manifest == engine.manifest
    shutil.rmtree(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
