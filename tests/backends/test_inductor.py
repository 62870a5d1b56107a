"""Inductor's artifacts: right at every size, complete, bound to their machine, and built by
processes that never outlive the build."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from inlay import LLM, CompileOptions, Engine, SamplingParams, compile_model
from inlay.backends.artifact import MANIFEST, write_manifest
from inlay.backends.base import BuildSettings, ModelLimits
from inlay.backends.eager.backend import EagerBackend, interpret
from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.backends.inductor.backend import OPS, PACKAGE, InductorBackend
from inlay.backends.inductor.compile import packed_weights
from inlay.backends.inductor.native import load_package
from inlay.backends.kernels.cpu_ops import build_ops
from inlay.backends.model import ProgramModel, SegmentCall
from inlay.backends.step import StepRequest, build_step
from inlay.engine import build
from inlay.errors import ArtifactError, BuildError
from inlay.lowering.capture import capture
from inlay.lowering.partition import partition
from inlay.passes.pass_manager import run_passes
from tests.toys import build_toy

OPTIONS = CompileOptions(backend="inductor", dtype="float32", block_size=16)
SIZES = (2, 3, 64, 100)
PROMPTS = [[5, 6, 7, 8, 9], [100], list(range(40, 61))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Two layers of llama: first, middle, tail and LM head."""
    return build(build_toy("llama"), tmp_path_factory.mktemp("inductor") / "engine", OPTIONS)


@pytest.fixture
def copied(engine: Engine, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine.path, tmp_path / "copy"))


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine, in_process=True, kv_cache_tokens=512) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


# --- numbers ---------------------------------------------------------------------------------


def compare(
    graph: dict[str, Any], compiled: SegmentCall, size: int, tolerance: float
) -> list[torch.Tensor]:
    """Random numbers through a segment, compiled and interpreted."""
    gm = graph_from_json(graph)
    packed = packed_weights(gm)
    ours, theirs = [], []
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        shape, dtype = node.meta["spec"]
        shape = [size if isinstance(extent, str) else extent for extent in shape]
        if dtype.is_floating_point:
            value = torch.randn(shape) * (0.1 if node.meta["kind"] == "weight" else 1.0)
        else:
            value = torch.randint(0, 2, shape)
        theirs.append(value.to(dtype))
        is_packed = node.meta["kind"] == "weight" and index in packed
        ours.append(packed[index](theirs[-1]) if is_packed else theirs[-1])
    with torch.no_grad():
        expected, got = interpret(gm)(theirs), compiled(ours)
    for one, two in zip(got, expected, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        error = (one.float() - two.float()).square().mean().sqrt()
        assert error <= tolerance * two.float().square().mean().sqrt().clamp_min(1e-6)
    return list(got)


def test_every_segment_at_every_size_in_float32(engine: Engine) -> None:
    engine.load_model()  # which loads the ops
    for key in engine.artifact.program.segment_keys:
        graph = engine.artifact.json(f"segments/{key}/graph.json")
        compiled = load_package(engine.artifact.segment_file(key, PACKAGE))
        for size in SIZES:
            outputs = compare(graph, compiled, size, 1e-5)
            assert any(size in output.shape for output in outputs)


@pytest.mark.parametrize(("dtype", "loss"), [("int8", 2.0**-6), ("fp8", 2.0**-4)])
def test_quantized_caches_and_hidden_states(engine: Engine, dtype: str, loss: float) -> None:
    """Against eager over the model's own cache; see test_kv_cache_model.py for the bound."""
    ours, eager = engine.load_model(), EagerBackend().load(engine.artifact)
    ours.allocate_kv_cache((8,), dtype)
    eager.allocate_kv_cache(8)
    for begin, end in ((0, 20), (20, 21), (21, 40)):
        tokens = [StepRequest(list(range(begin, end)), begin, [[5, 2, 7]])]
        logits, hidden = ours.forward_hidden(build_step(tokens, 16, num_tokens=24))
        kept = hidden.clone()
        expected, theirs = eager.forward_hidden(build_step(tokens, 16, num_tokens=24))
        for got, exact in ((logits[0], expected[0]), (hidden[: end - begin], theirs)):
            size = exact[: len(got)].square().mean().sqrt()
            assert (got - exact[: len(got)]).square().mean().sqrt() <= 6 * loss * size
        ours.forward(build_step(tokens, 16, num_tokens=24))
        assert torch.equal(hidden, kept)  # compiled code does not take its memory back


@pytest.mark.parametrize("cache", [None, "int8", "fp8"])
def test_the_loop_in_cpp_gives_the_interpreters_bits(engine: Engine, cache: str | None) -> None:
    """An observer brings the interpreter in; caches are allocated again in between."""
    model, seen = engine.load_model(), []
    assert isinstance(model, ProgramModel)
    results = []
    for observer in (None, lambda index, values: seen.append(index) or values):
        model.observer = observer
        model.allocate_kv_cache(8, cache)
        for begin, end in ((0, 20), (20, 21), (21, 40)):
            tokens = [StepRequest(list(range(begin, end)), begin, [[5, 2, 7]])]
            logits, hidden = model.forward_hidden(build_step(tokens, 16, num_tokens=24))
            results.append((logits, hidden[: end - begin]))  # padding holds anything
        results.append((model.forward(build_step(tokens, 16)), torch.empty(0)))
    assert seen == 4 * list(range(len(model.program.steps)))
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_middle_segment_at_every_size_in_bfloat16(tmp_path: Path) -> None:
    model = build_toy("llama", torch.bfloat16)
    captured = capture(model, 64)
    run_passes(captured.graph)
    program, segments = partition(captured.graph, torch.bfloat16)
    middle = program.segment_keys[1]
    limits = ModelLimits(128, 256, 64, 8, 16)
    (tmp_path / middle).mkdir()
    backend, settings = InductorBackend(), BuildSettings(limits, 0, print)
    backend.check(program, segments, settings)
    backend.build(program, {middle: segments[middle]}, tmp_path, settings)
    compiled = load_package(tmp_path / middle / PACKAGE)
    for size in SIZES:
        # Intermediate values that Inductor keeps in float32 the interpreter rounds: 2^-9 each.
        compare(graph_to_json(segments[middle]), compiled, size, 1e-2)


def test_tokens_are_those_of_the_graphs_interpreted(engine: Engine) -> None:
    fallback = Engine.load(engine.path, backend="eager")
    assert (engine.backend, fallback.backend) == ("inductor", "eager")
    expected = tokens(fallback)
    assert tokens(engine) == expected
    assert len({token for row in expected for token in row}) > 12


# --- the cache of segments -------------------------------------------------------------------


def test_a_second_build_compiles_nothing(engine: Engine, tmp_path: Path) -> None:
    lines: list[str] = []
    again = build(build_toy("llama"), tmp_path / "again", OPTIONS, progress=lines.append)
    assert again.manifest["target"]["num_compiled"] == 0
    assert "0 compiled, 4 from the cache" in lines
    assert again.artifact.program == engine.artifact.program


# --- the artifact ----------------------------------------------------------------------------


def test_there_is_no_pickle_in_it(engine: Engine) -> None:
    kinds = {".json", ".safetensors", ".so", ".pt2"}
    assert {path.suffix for path in engine.path.rglob("*") if path.is_file()} == kinds
    for package in engine.path.rglob("*.pt2"):
        with zipfile.ZipFile(io.BytesIO(package.read_bytes())) as archive:
            members = archive.namelist()
            begins = {name: archive.read(name)[:1] for name in members}
        assert any(name.endswith(".so") for name in members)
        # C++ sources, their library, JSON, and the archive's few bytes about itself.
        told = ("archive_format", "archive_version", "version", "byteorder", "serialization_id")
        for name in members:
            assert name.endswith((".cpp", ".h", ".so", ".json", *told)), name
            assert begins[name] != b"\x80", f"{name} begins as a pickle does"


@pytest.mark.parametrize("pattern", [OPS, f"segments/*/{PACKAGE}", "segments/*/graph.json"])
def test_damaged_code_is_not_run(pattern: str, copied: Path) -> None:
    file = sorted(copied.glob(pattern))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    name = file.relative_to(copied)
    for options in ({}, {"backend": "eager"}):
        with pytest.raises(ArtifactError, match=f"{name} has been changed: its sha256 differs"):
            Engine.load(copied, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [("torch", "2.99.0"), ("machine", "aarch64"), ("cpu_capability", "AMX"), ("device", "cuda")],
)
def test_another_machines_artifact_says_what_differs(key: str, value: str, copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    here = manifest["target"][key]
    manifest["target"][key] = value
    write_manifest(copied, manifest)
    engine = Engine.load(copied)
    with pytest.raises(ArtifactError) as caught:
        engine.load_model()
    message = str(caught.value)
    assert key in message
    assert value in message
    assert str(here) in message
    assert "inlay build MODEL -o DIR --dtype float32" in message
    assert "backend='eager'" in message
    assert tokens(Engine.load(copied, backend="eager"))


def test_an_artifact_for_instructions_that_are_not_here(copied: Path) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["target"]["cpu_flags"].append("avx1024")
    write_manifest(copied, manifest)
    with pytest.raises(ArtifactError, match=r"avx1024.*rebuild"):
        Engine.load(copied).load_model()


RUN = """
import json, sys
from inlay import LLM, Engine, SamplingParams
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
llm = LLM(Engine.load(sys.argv[1], check_weights=True), kv_cache_tokens=512)
outputs = llm.generate(json.loads(sys.argv[2]), params, use_tqdm=False)
print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_loading_needs_no_compiler_and_no_cache(engine: Engine, copied: Path) -> None:
    moved = copied.rename(copied.with_name("ein anderer Ort"))
    environment = {**os.environ, "PATH": "", "CXX": "", "INLAY_CACHE_DIR": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(moved), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == tokens(engine)


# --- what can go wrong in a build ------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["", "no-such-compiler -v"])
def test_without_a_compiler(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INLAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    missing = f"CXX={compiler}" if compiler else r"none of c\+\+, g\+\+, clang\+\+"
    with pytest.raises(BuildError, match=rf"needs a C\+\+ compiler: {missing} was found on PATH"):
        build(build_toy("llama", layers=1), tmp_path / "engine", OPTIONS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not (tmp_path / "engine").exists()
    made = compile_model(build_toy("llama", layers=1), "eager")  # which needs none
    assert made.path.is_dir()


class Building:
    """`inlay build` of a toy with a cache of its own, which holds no segment yet."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.cache, self.place = folder / "cache", folder / "place"
        ops = build_ops()
        (self.cache / "ops").mkdir(parents=True, exist_ok=True)
        shutil.copy2(ops, self.cache / "ops")
        command = [sys.executable, "-m", "inlay.cli", "build", str(model), "--dtype", "float32"]
        self.process = subprocess.Popen(
            [*command, "-o", str(self.place / "engine")],
            env={**os.environ, "INLAY_CACHE_DIR": str(self.cache)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children: list[psutil.Process] = []

    def wait_for(self, is_child: Callable[[psutil.Process], bool]) -> None:
        """Until there is such a process below ours; all that there are then are remembered."""
        deadline = time.monotonic() + 120
        while True:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            self.children = psutil.Process(self.process.pid).children(recursive=True)
            if any(is_child(child) for child in self.children):
                return
            time.sleep(0.05)

    def end(self, number: int) -> str:
        """Send a signal; returns what was said, once the process and all its children ended."""
        begin = time.monotonic()
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        gone, alive = psutil.wait_procs(self.children, timeout=20)
        assert not alive
        assert len(gone) == len(self.children) > 0
        assert time.monotonic() - begin < 20
        return said

    def temporaries(self) -> list[str]:
        """What lies in the cache and beside the target that is not meant to stay."""
        folders = [self.place, *(self.cache / name for name in ("ops", "segments", "staging"))]
        names = [path.name for folder in folders if folder.is_dir() for path in folder.iterdir()]
        return [name for name in names if not name.endswith((".so", ".pt2", ".json"))]


def is_worker(process: psutil.Process) -> bool:
    try:
        return any("inductor.compile" in word for word in process.cmdline())
    except psutil.Error:
        return False


def is_compiler(process: psutil.Process) -> bool:
    try:
        return process.name() in ("cc1plus", "clang", "clang++")
    except psutil.Error:
        return False


def test_killed_and_interrupted_builds(tmp_path: Path) -> None:
    build_toy("llama").save_pretrained(tmp_path / "model")
    killed = Building(tmp_path, tmp_path / "model")
    killed.wait_for(is_worker)
    killed.end(signal.SIGKILL)
    assert killed.process.returncode == -signal.SIGKILL
    left = killed.temporaries()
    assert len(left) == 2, "a directory in the cache and one beside the target"

    interrupted = Building(tmp_path, tmp_path / "model")
    interrupted.wait_for(is_compiler)
    assert not set(left) & set(interrupted.temporaries()), "the next build removes what was left"
    assert "inlay build: interrupted" in interrupted.end(signal.SIGINT)
    assert interrupted.process.returncode == 130
    assert not interrupted.temporaries()
    assert not list(interrupted.place.iterdir())
