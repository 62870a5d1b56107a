"""OpenVINO GenAI: its continuous batching pipeline, models converted by optimum-intel and NNCF."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as ov_genai

# The settings of `optimum-cli export openvino --weight-format`; activations are the plugin's
# choice (INFERENCE_PRECISION_HINT, dynamic quantization groups), and so is its KV cache.
WEIGHTS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"bits": 8},
    "int4": {"bits": 4, "group_size": 128, "sym": False, "ratio": 1.0},
}


def versions() -> dict[str, str]:
    names = ("openvino", "openvino-genai", "optimum-intel", "nncf")
    return {name: importlib.metadata.version(name) for name in names}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    settings = WEIGHTS[job["precision"]]
    config = None if settings is None else OVWeightQuantizationConfig(**settings)
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=config
    )
    model.save_pretrained(directory)


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        scheduler = ov_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 64
        options = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = ov_genai.ContinuousBatchingPipeline(
            str(directory), scheduler, "CPU", {**options, **job.get("options", {})}
        )
        self.conditions = {"batching": "continuous", "activations": "the plugin's own choice"}
        self.next_id = 0

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        handles = []
        for request in requests:
            config = ov_genai.GenerationConfig()
            config.max_new_tokens = request["max_tokens"]
            config.ignore_eos = True
            config.set_eos_token_id(0)  # the checkpoint may have none, and it must be a token
            config.do_sample = False
            ids = ov.Tensor(np.array([request["prompt_token_ids"]], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.next_id, ids, config))
            self.next_id += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        answers.add(index, list(output.generated_ids))
