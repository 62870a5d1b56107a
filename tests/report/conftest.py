"""One report of a toy, made once; and a model that no toy is, with experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inlay.lowering.options import CompileOptions
from inlay.lowering.random_weights import randomise
from inlay.report.collect import of_model
from inlay.report.facts import Report
from tests.toys import build_toy

FLOAT32 = CompileOptions(backend="eager", dtype="float32", verify="pass", max_num_tokens=64)


def report_of(model: PreTrainedModel, path: Path) -> Report:
    model.save_pretrained(path)
    return of_model(str(path), FLOAT32, lambda line: None)


def mixtral() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=64,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        max_position_embeddings=256,
    )
    return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(build_toy("llama"), tmp_path_factory.mktemp("report") / "llama")
