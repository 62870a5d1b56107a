"""Converted segments in the compile cache: converting takes seconds, what it gives is small."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from inlay.backends.cache import building, cache_dir, content_key, fetch, keep
from inlay.backends.graph_json import graph_to_json
from inlay.backends.onnx.convert import OPSET, segment_to_onnx
from inlay.backends.onnx.packages import require
from inlay.errors import BuildError
from inlay.passes.ops import REFERENCES

MODEL = "model.onnx"


def convert_segments(
    segments: Mapping[str, GraphModule], target: str, origin: str
) -> tuple[dict[str, bytes], int]:
    """Each segment's ONNX model, serialized, and how many of them the cache did not hold.

    target: as `segment_to_onnx` takes it, which raises what is raised here. origin: the model's
    name, noted in the cache.
    """
    onnx, onnxscript = require("onnx", "onnxscript", extra=target)
    folder = cache_dir() / "segments"
    tools = {
        "target": target,
        "opset": OPSET,
        "packages": [torch.__version__, onnx.__version__, onnxscript.__version__],
        "sources": _sources(),
    }
    try:
        return _converted(segments, target, origin, folder, tools)
    except OSError as error:
        raise BuildError(
            f"cannot convert segments in {folder}: {error}; set INLAY_CACHE_DIR to a directory "
            "that can be written"
        ) from error


def _converted(
    segments: Mapping[str, GraphModule],
    target: str,
    origin: str,
    folder: Path,
    tools: dict[str, Any],
) -> tuple[dict[str, bytes], int]:
    models, num_converted = {}, 0
    with building(folder) as scratch:
        file = scratch / MODEL
        for key, gm in segments.items():
            place = folder / f"{content_key({'graph': graph_to_json(gm), **tools})}.onnx"
            if not fetch(place, file):
                file.write_bytes(segment_to_onnx(gm, target).SerializeToString())
                models[key] = file.read_bytes()
                keep(file, place, {"origin": origin, "segment": key, "torch": torch.__version__})
                num_converted += 1
            else:
                models[key] = file.read_bytes()
    return models, num_converted


def _sources() -> str:
    """A hash of what decides how a graph is converted."""
    files: set[Any] = {inspect.getsourcefile(reference) for reference in REFERENCES.values()}
    files |= {str(path) for path in Path(__file__).parent.glob("*.py")}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
