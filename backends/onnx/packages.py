"""The packages that this folder and its backends need, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from inlay.errors import ArtifactError, BuildError

NEEDED = ("onnx", "onnxscript")


def require(*names: str, extra: str, error: type[Exception] = BuildError) -> tuple[Any, ...]:
    """The modules of these names; raises error with pip's command where one is missing."""
    try:
        return tuple(importlib.import_module(name) for name in names)
    except ImportError as cause:
        another = "choose backend='inductor'"
        if error is ArtifactError:  # it is built already
            another = "run its graphs uncompiled with backend='eager'"
        raise error(
            f"the package {cause.name!r} is needed and not installed; run "
            f"`pip install 'inlay[{extra}]'`, or {another}"
        ) from cause
