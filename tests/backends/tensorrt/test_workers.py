"""The processes that build engines: how many, what is told of memory, what a failure says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inlay.backends.tensorrt import workers
from inlay.backends.tensorrt.network import Weights
from inlay.backends.tensorrt.workers import Job, build_engines, num_workers, place_of
from inlay.errors import BuildError


def job(name: str = "step 0", weight_bytes: int = 1 << 20, model: str = "none.onnx") -> Job:
    return Job(name, model, {"w0": ("weights", 0, weight_bytes)}, [], "auto", f"{name}.plan")


def test_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    jobs = [job(weight_bytes=1 << 30), *[job(weight_bytes=1 << 20)] * 9]
    assert num_workers(jobs, 1 << 40) == 8
    small, large = jobs[1].memory, jobs[0].memory
    assert num_workers(jobs, large + 3 * small) == 4
    assert num_workers(jobs, 0) == 1  # it is tried: free memory is a guess
    assert num_workers(jobs[:2], 1 << 40) == 2


def test_the_estimate_grows_with_the_weights() -> None:
    assert job(weight_bytes=0).memory < job(weight_bytes=1 << 30).memory
    assert job(weight_bytes=1 << 30).memory > 3 << 30


def test_what_is_told_before_and_a_failure_names_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker without a library that it can use ends at once; its last words are in the error."""
    told: list[str] = []
    monkeypatch.setattr(workers, "available_memory", lambda: 1 << 20)
    with pytest.raises(BuildError, match=r"step 0 died \(status 1; .*11 or later"):
        build_engines([job()], "json", told.append)
    assert told[0].startswith("1 engines in 1 processes: about 264 MiB of memory at most, 1 MiB ")
    assert told[0].endswith("which may not suffice")


def test_weights_are_read_where_they_lie(tmp_path: Path) -> None:
    """Byte for byte as safetensors has them, and INT4 with 8 standing for 0."""
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.tensor([[0x80, 0x7F]], dtype=torch.uint8),
    }
    file = tmp_path / "weights.safetensors"
    save_file(tensors, file)
    weights = Weights()
    place = place_of(file, "a")
    assert weights.bytes_at(*place).tobytes() == tensors["a"].view(torch.uint8).numpy().tobytes()
    int4 = weights.bytes_at(*place_of(file, "b"), True)
    assert int4.tolist() == [0x08, 0xF7]  # 0 and 8 are -8 and 0, 15 and 7 are 7 and -1
