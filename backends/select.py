"""The backends, by name. Each is imported when it is asked for."""

from __future__ import annotations

import importlib

from inlay.backends.base import Backend
from inlay.errors import OptionError

BACKENDS = {
    "inductor": "inlay.backends.inductor.backend:InductorBackend",
    "onnxruntime": "inlay.backends.onnxruntime.backend:OnnxRuntimeBackend",
    "tensorrt": "inlay.backends.tensorrt.backend:TensorRTBackend",
    "eager": "inlay.backends.eager.backend:EagerBackend",
}


def get_backend(name: str) -> Backend:
    """Raises OptionError for a name that is not in BACKENDS."""
    if name not in BACKENDS:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    module, _, cls = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()
