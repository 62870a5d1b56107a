"""Inlay: compile a Hugging Face causal language model, verify it, and serve it.

>>> from inlay import LLM, SamplingParams, compile_model
>>> engine = compile_model("demo", backend="inductor")
>>> LLM(engine).generate("A list is", SamplingParams(max_tokens=16, temperature=0))

The names below are imported when first used, so that `import inlay` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CompileOptions": "inlay.lowering.options",
    "CompletionOutput": "inlay.runtime.outputs",
    "Engine": "inlay.engine",
    "EngineError": "inlay.errors",
    "InlayError": "inlay.errors",
    "LLM": "inlay.llm",
    "RequestHandle": "inlay.handle",
    "RequestOutput": "inlay.runtime.outputs",
    "SamplingParams": "inlay.runtime.sampling_params",
    "compile_model": "inlay.engine",
    "evaluate": "inlay.eval",
}

__all__ = [*sorted(_HOME), "__version__"]

if TYPE_CHECKING:
    from inlay.engine import Engine as Engine
    from inlay.engine import compile_model as compile_model
    from inlay.errors import EngineError as EngineError
    from inlay.errors import InlayError as InlayError
    from inlay.eval import evaluate as evaluate
    from inlay.handle import RequestHandle as RequestHandle
    from inlay.llm import LLM as LLM
    from inlay.lowering.options import CompileOptions as CompileOptions
    from inlay.runtime.outputs import CompletionOutput as CompletionOutput
    from inlay.runtime.outputs import RequestOutput as RequestOutput
    from inlay.runtime.sampling_params import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
