"""Engines of TensorRT-RTX built without a GPU: seconds, sizes, memory told before and true.

    python -m inlay.bench.tensorrt_build [--shape 0.5b] [--dtype bfloat16] [--target auto]

Random weights of a real shape. The build is one of `inlay build`'s; whether its engines run is not
measured. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from inlay.backends.tensorrt.engines import REPORT
from inlay.backends.tensorrt.library import TARGETS
from inlay.bench.shapes import SHAPES, save_shape
from inlay.bench.startup import build


def measure(shape: str, dtype: str, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_shape(shape, Path(folder) / "checkpoint")
        (Path(folder) / "build").mkdir()
        options = {"backend": "tensorrt", "dtype": dtype, "target": target}
        built = build(checkpoint, Path(folder) / "build", "engine", options)
        engine = Path(folder) / "build" / "engine"
        manifest = json.loads((engine / "inlay.json").read_text())
        report = json.loads((engine / "segments" / REPORT).read_text())
    on, engines = manifest["target"], report["engines"]
    return {
        "bench": "tensorrt_build",
        "shape": shape,
        "dtype": dtype,
        "library": f"{on['library']} {on['version']}",
        "target": TARGETS[target],
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "limits": {key: manifest["limits"][key] for key in ("max_num_tokens", "max_num_seqs")},
        "build": built,
        "engines": {
            "count": on["engines"],
            "distinct_segments": manifest["num_segments"],
            "plan_mb": round(on["plan_bytes"] / 1e6, 1),
            "weights_mb": round(
                sum(f["size"] for n, f in manifest["files"].items() if n.endswith(".safetensors"))
                / 1e6,
                1,
            ),
            "processes": report["processes"],
            "seconds_each": [min(s := [e["seconds"] for e in engines]), max(s)],
            "nodes": sum(e["num_nodes"] for e in engines),
            "kernels_of_two_profiles": sum(len(e["layers"]) for e in engines),
            "scratch_mb": round(max(e["activation_bytes"] for e in engines) / 1e6, 1),
        },
        "workers_memory_mb": {
            "estimated": round(report["estimated_bytes"] / 1e6),
            "peak": round(report["peak_bytes"] / 1e6),
        },
        "errors": manifest["errors"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--target", choices=TARGETS, default="auto")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.shape, arguments.dtype, arguments.target)), flush=True)


if __name__ == "__main__":
    main()
