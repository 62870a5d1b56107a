"""One adapter over `tensorrt` (11 and later) and `tensorrt_rtx`: the two have one network API.

TensorRT-RTX builds engines without a GPU, for named targets, and compiles their kernels when they
are loaded; TensorRT builds on the GPU that is to run them. Nothing is imported before `find`.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from inlay.errors import BuildError

LIBRARIES = ("tensorrt_rtx", "tensorrt")
"""In order of preference: the first needs no GPU to build."""

INSTALL = {
    "tensorrt_rtx": "pip install 'inlay[tensorrt-rtx]'",
    "tensorrt": "pip install --extra-index-url https://pypi.nvidia.com 'inlay[tensorrt]'",
}

AUTO = "auto"
TARGETS = {
    AUTO: "sm80 and later",
    "sm75": "sm75",
    "sm80": "sm80",
    "sm86": "sm86",
    "sm89": "sm89",
    "sm120": "sm120",
    "sm121": "sm121",
}
"""Targets of a build -> what the manifest says of them."""

FIRST_MAJOR = 11
"""Of TensorRT: from this version on networks are strongly typed, always."""


@dataclass(frozen=True)
class Library:
    """name: of LIBRARIES. module: the imported library, or what stands in for it in a test."""

    name: str
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    def compute_capability(self, target: str) -> Any:
        """The library's own name of a target that is not AUTO."""
        return getattr(self.module.ComputeCapability, target.upper())


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def find(name: str = AUTO) -> Library:
    """The library of this name, or the first of LIBRARIES that is installed.

    Raises BuildError where it is not installed, or older than this adapter knows.
    """
    wanted = LIBRARIES if name == AUTO else (name,)
    found = next((one for one in wanted if is_installed(one)), None)
    if found is None:
        ways = " or ".join(INSTALL[one] for one in wanted)
        raise BuildError(f"backend 'tensorrt' needs {' or '.join(wanted)}: {ways}")
    try:
        library = Library(found, importlib.import_module(found))
        library.version  # noqa: B018  (a directory of that name can be imported, but is no library)
    except (ImportError, AttributeError) as error:
        raise BuildError(
            f"backend 'tensorrt': {found} is installed but cannot be imported ({error}): "
            f"{INSTALL[found]}"
        ) from error
    if not library.is_rtx and int(library.version.split(".")[0]) < FIRST_MAJOR:
        raise BuildError(
            f"backend 'tensorrt' needs tensorrt {FIRST_MAJOR} or later, whose networks are strongly"
            f" typed; installed is {library.version}: {INSTALL['tensorrt']}"
        )
    return library
