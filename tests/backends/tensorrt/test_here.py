"""Whether engines can be built or run here: each refusal names the reason and the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inlay.backends.tensorrt import here, library
from inlay.backends.tensorrt.library import AUTO, TARGETS, Library, find
from inlay.errors import ArtifactError, BuildError, OptionError
from inlay.lowering.options import CompileOptions


def artifact(**target: str) -> Any:
    built = {"library": "tensorrt_rtx", "version": "1.7.1.116", "target": AUTO, **target}
    return SimpleNamespace(
        path=Path("engine"), manifest={"target": built, "rebuild": "inlay build X"}
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an sm90 and TensorRT-RTX 1.7.1.116."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    module = SimpleNamespace(__version__="1.7.1.116")
    for place in (here, library):
        monkeypatch.setattr(place, "is_installed", lambda name: name == "tensorrt_rtx")
    monkeypatch.setattr(here, "find", lambda name: Library(name, module))


def test_without_a_gpu() -> None:
    with pytest.raises(ArtifactError, match=r"need a GPU \(sm80 and later\).*backend='eager'"):
        here.check_here(artifact())


@pytest.mark.usefixtures("gpu")
def test_where_all_fits() -> None:
    assert here.check_here(artifact()).name == "tensorrt_rtx"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ({"library": "tensorrt", "version": "11.4.0"}, "tensorrt 11.4.0, which is not installed"),
        ({"version": "1.6.0"}, "tensorrt_rtx 1.6.0, here it is 1.7.1.116"),
        ({"target": "sm120"}, "built for sm120, this GPU is sm90: rebuild it .inlay build X"),
    ],
)
def test_what_differs_is_named(target: dict[str, str], told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        here.check_here(artifact(**target))


@pytest.mark.parametrize(
    ("target", "device", "fits"),
    [
        (AUTO, "sm75", False),
        (AUTO, "sm80", True),
        (AUTO, "sm90", True),
        (AUTO, "sm120", True),
        ("sm86", "sm86", True),
        ("sm86", "sm89", False),
        ("sm75", "sm75", True),
    ],
)
def test_targets(target: str, device: str, fits: bool) -> None:
    assert here.is_for(target, device) == fits


def test_full_tensorrt_builds_on_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Library("tensorrt", None)
    with pytest.raises(BuildError, match="TensorRT-RTX builds without"):
        here.check_target(full, AUTO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    here.check_target(full, "sm89")
    with pytest.raises(BuildError, match="which is sm89, not for sm120"):
        here.check_target(full, "sm120")


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", lambda name: False)
    with pytest.raises(BuildError, match=r"inlay\[tensorrt-rtx\].* or .*inlay\[tensorrt\]"):
        find()
    with pytest.raises(BuildError, match=r"needs tensorrt: .*pypi\.nvidia\.com"):
        find("tensorrt")


def test_the_preferred_library(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "11.4.0"}
    monkeypatch.setattr(library, "is_installed", lambda name: name in modules)
    monkeypatch.setattr(
        library.importlib, "import_module", lambda name: SimpleNamespace(__version__=modules[name])
    )
    assert find().name == "tensorrt_rtx"
    assert find("tensorrt").version == "11.4.0"
    modules["tensorrt"] = "10.14.1"
    with pytest.raises(BuildError, match=r"11 or later.*installed is 10\.14\.1"):
        find("tensorrt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "tensorrt", "target": "sm90"}, "target must be one of auto, sm75, .*'sm90'"),
        ({"backend": "tensorrt", "library": "onnx"}, "library must be one of auto, tensorrt_rtx"),
        ({"backend": "tensorrt", "fallback": "eager"}, "fallback must be one of none, inductor"),
        ({"target": "sm89"}, "target is an option of backend='tensorrt'"),
        ({"backend": "eager", "fallback": "inductor"}, "fallback is an option of"),
        ({"library": "tensorrt"}, "library is an option of"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, str], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        CompileOptions(**options)


def test_options_of_the_backend() -> None:
    for target in TARGETS:
        assert CompileOptions(backend="tensorrt", target=target).target == target
