"""The packages that this folder and its backends need, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from inlay.errors import BuildError

NEEDED = ("onnx", "onnxscript")


def require(*names: str, extra: str, error: type[Exception] = BuildError) -> tuple[Any, ...]:
    """The modules of these names; raises error with pip's command where one is missing."""
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError as cause:
        raise error(
            f"backend={extra!r} needs the package {cause.name!r}, which is not installed; run "
            f"`pip install 'inlay[{extra}]'`, or choose backend='inductor'"
        ) from cause
