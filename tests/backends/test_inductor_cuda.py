"""Inductor on CUDA, as far as it goes without a GPU: packages whose products are found by torch's
dispatcher, compiled for the CPU and run by the loader that runs them on a GPU; what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay import Engine, compile_model
from inlay.backends.artifact import WeightReader
from inlay.backends.device import needing_memory
from inlay.backends.eager.backend import interpret
from inlay.backends.graph_json import graph_from_json
from inlay.backends.inductor import cuda
from inlay.backends.inductor.compile import PRODUCTS, compile_segment, inductor_config
from inlay.errors import ArtifactError, BuildError, OptionError
from inlay.passes.check import relative_rms
from inlay.passes.graph import is_call
from tests.quantizable import build_quantizable
from tests.toys import build_toy

CASES = [("llama", "w8a8")]
SLOW = [
    ("qwen3_moe", "none"),
    ("qwen3_moe", "w4a16"),
    ("llama", "fp8"),
    ("gemma2", "w4a16"),
    ("gpt_oss", "w8a8"),
]


def middle(engine: Engine) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The graph of a segment between two attention calls, and its weights there."""
    step = engine.artifact.program.segment_steps[1]
    reader = WeightReader(engine.artifact)
    graph = engine.artifact.json(f"segments/{step.segment}/graph.json")
    return graph, [reader.get(name) for name in step.weights]


@pytest.mark.parametrize(
    ("name", "quantization"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_products_go_through_the_dispatcher(name: str, quantization: str, tmp_path: Path) -> None:
    engine = compile_model(
        build_quantizable(name), "eager", quantization=quantization, verify="capture"
    )
    graph, weights = middle(engine)
    compile_segment(graph, tmp_path / "segment.pt2", 0, is_dispatched=True)
    call = cuda.load_package(tmp_path / "segment.pt2", torch.device("cpu"))
    gm = graph_from_json(graph)
    called: set[str] = set()
    for rows in (2, 17):
        specs = [node.meta["spec"] for node in gm.graph.find_nodes(op="placeholder")]
        inputs = [
            torch.randn([rows if isinstance(size, str) else size for size in shape]).to(dtype)
            for shape, dtype in specs[len(weights) :]
        ]
        with torch.profiler.profile() as profile:
            found = call([*weights, *inputs])
        called |= {event.key for event in profile.key_averages()}
        expected = interpret(gm)([*weights, *inputs])
        for one, other in zip(expected, found, strict=True):
            # The same products of the same numbers; sums of norms in another order.
            assert relative_rms(one, other) < 1e-5
    products = [n.target for n in gm.graph.nodes if is_call(n, *PRODUCTS[1:])]
    assert products
    assert {f"inlay::{target._opname}" for target in products} <= called


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_machine_without_a_gpu_refuses_before_anything_is_read(backend: str) -> None:
    with pytest.raises(BuildError, match=r"device='cuda' cannot be served: torch .* give device"):
        compile_model("no/such/model", backend, device="cuda")


def test_devices_are_an_option_of_torchs_own_code() -> None:
    with pytest.raises(OptionError, match="device must be one of auto, cpu, cuda, got 'gpu'"):
        compile_model("demo", device="gpu")
    with pytest.raises(OptionError, match="option of backend='inductor' or 'eager'; backend 'onnx"):
        compile_model("demo", "onnxruntime", device="cpu")


def test_the_drivers_library_gets_the_name_that_linkers_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = """7f10-7f20 r--p 00000000 00:2d 81   /usr/lib/x/libcudart.so.13
7f30-7f40 r-xp 00000000 00:2d 82                       /usr/local/nv idia/lib64/libcuda.so.580.9
7f30-7f40 rw-p 00000000 00:00 0
"""
    assert cuda.driver_library(maps) == "/usr/local/nv idia/lib64/libcuda.so.580.9"
    assert cuda.driver_library(maps.replace("libcuda.so", "libother.so")) is None
    monkeypatch.setattr(cuda, "driver_library", lambda maps: "/lib/libcuda.so.1")
    monkeypatch.setenv("LIBRARY_PATH", "/others")
    found = cuda.link_environment(tmp_path / "lib")["LIBRARY_PATH"]
    assert found == f"{tmp_path}/lib{os.pathsep}/others"
    assert os.readlink(tmp_path / "lib" / "libcuda.so") == "/lib/libcuda.so.1"


def test_plain_products_are_timed_on_request() -> None:
    """A setting that this torch does not know would be left out without a word."""
    timed = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
    assert inductor_config(3, "cuda").items() >= timed.items()
    for level, device in ((2, "cuda"), (3, "cpu")):
        assert not inductor_config(level, device).keys() & timed.keys()


@needs_no_gpu
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_an_artifact_for_cuda_says_why_it_does_not_load(backend: str) -> None:
    engine = compile_model(build_toy("llama"), "eager", verify="capture")
    manifest = engine.manifest
    manifest["backend"] = backend
    manifest["options"]["device"] = "cuda"
    manifest["target"] = {"device": "cuda"} if backend == "inductor" else {}
    with pytest.raises(ArtifactError, match=r"CUDA|'cuda'.* cannot be served"):
        Engine(engine.artifact).load_model()
    if backend == "inductor":  # its graphs run anywhere
        Engine(engine.artifact, "eager").load_model()


def test_code_for_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = compile_model(build_toy("llama"), "eager", verify="capture")
    here = {"device": "cuda", "compute_capability": "9.0", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(cuda, "choose_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(cuda, "target", lambda: here)
    engine.manifest["target"] = {**here, "compute_capability": "8.0"}
    with pytest.raises(ArtifactError, match=r"for compute_capability '8\.0', here it is"):
        cuda.load(engine.artifact, "inductor.pt2")


def test_what_finds_no_room_on_a_gpu_is_named() -> None:
    said = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 1 GiB free. Of it much is"
    with (
        pytest.raises(OptionError, match=r"no room for CUDA graphs: CUDA out of memory\. .* lower"),
        needing_memory("CUDA graphs", "lower max_num_seqs"),
    ):
        raise torch.OutOfMemoryError(said)
