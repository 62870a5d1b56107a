"""Inlay itself, behind the same protocol as its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import inlay
from inlay import LLM, Engine, SamplingParams
from inlay.engine import compile_model


def versions() -> dict[str, str]:
    return {
        "inlay": inlay.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    options = dict(job.get("options", {}))
    if job.get("quantization"):
        options["quantization"] = job["quantization"]
    engine = compile_model(checkpoint, job["backend"], dtype=job["dtype"], **options)
    engine.save(directory / "engine")


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        engine = Engine.load(directory / "engine")
        self.llm = LLM(
            engine,
            num_threads=job["threads"],
            kv_cache_tokens=job["kv_tokens"],
            enable_prefix_caching=False,
        )
        self.conditions = {
            "batching": "continuous",
            "backend": engine.backend,
            "dtype": engine.manifest["dtype"],
            "relative_error": (engine.manifest.get("errors") or {}).get("engine"),
        }

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        handles = []
        for request in requests:
            params = SamplingParams(
                temperature=0, max_tokens=request["max_tokens"], ignore_eos=True
            )
            handles.append(self.llm.generate_async(request["prompt_token_ids"], params))
        for index, handle in enumerate(handles):
            output = handle.result()
            if output.error is not None:
                raise output.error
            times = output.metrics
            tokens = output.outputs[0].token_ids
            answers.put(index, tokens, times.first_token_time, times.finish_time)
