"""Hugging Face transformers: `generate`, one static, left-padded batch to the longest output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def prepare(checkpoint: Path, directory: Path, job: dict[str, Any]) -> None:
    (directory / "checkpoint").symlink_to(checkpoint.resolve())


class Watch(StoppingCriteria):
    """Stops nothing: it is called for each step, with the tokens so far."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        for index, token in enumerate(input_ids[:, -1].tolist()):
            self.answers.add(index, [token])
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Model:
    def __init__(self, directory: Path, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(
            directory / "checkpoint", dtype=DTYPES[job["precision"]]
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.conditions = {
            "batching": "static, left-padded",
            "attention": self.model.config._attn_implementation,
        }

    @torch.inference_mode()
    def run(self, requests: list[dict[str, Any]], answers: Any) -> None:
        prompts = [request["prompt_token_ids"] for request in requests]
        longest = max(map(len, prompts))
        num_new = max(request["max_tokens"] for request in requests)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Watch(answers)]),
        )
