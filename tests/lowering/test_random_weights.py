"""Random models tell right from wrong: every known-bad twin of a toy gives other tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from inlay.verify.source import random_source
from tests.toys import TOYS, build_toy, config_of

NUM_TOKENS = 24
MIN_DISTINCT = 12


def greedy(model: PreTrainedModel) -> list[int]:
    prompt = torch.arange(3, 40)[None]
    out = model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
    return out[0, prompt.shape[1] :].tolist()


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert len(found) == model.config.num_hidden_layers
    return found


def without_rope(model: PreTrainedModel) -> bool:
    rotary = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
    for module in rotary:
        module.inv_freq.zero_()
    return bool(rotary)


def with_other_scale(model: PreTrainedModel) -> bool:
    for module in attentions(model):
        module.scaling *= 1.1
    return True


def with_window_off_by_one(model: PreTrainedModel) -> bool:
    # The mask is built from the config, once for all layers.
    if getattr(model.config, "sliding_window", None) is None:
        return False
    model.config.sliding_window += 1
    return True


def without_biases(model: PreTrainedModel) -> bool:
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    biased = [m for m in linear if m.bias is not None]
    for module in biased:
        module.bias.zero_()
    return bool(biased)


def without_norm_weights(model: PreTrainedModel) -> bool:
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    assert norms
    for module in norms:
        # gemma stores w - 1
        module.weight.fill_(0.0 if "Gemma" in type(module).__name__ else 1.0)
    return True


TWINS: tuple[Callable[[PreTrainedModel], bool], ...] = (
    without_rope,
    with_other_scale,
    with_window_off_by_one,
    without_biases,
    without_norm_weights,
)


@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_outputs_vary_and_every_known_bad_twin_differs(name: str) -> None:
    model = build_toy(name)
    expected = greedy(model)
    assert len(set(expected)) >= MIN_DISTINCT
    applied = []
    for spoil in TWINS:
        twin = copy.deepcopy(model)
        if spoil(twin):
            applied.append(spoil.__name__)
            assert greedy(twin) != expected, spoil.__name__
    assert {"with_other_scale", "without_norm_weights"} <= set(applied)
    assert ("without_rope" in applied) == (name != "gpt2")
    assert ("without_biases" in applied) == (name in ("gpt2", "qwen2"))
    assert ("with_window_off_by_one" in applied) == (name in ("mistral", "gemma2"))


def test_a_seed_gives_the_same_model_each_time(tmp_path: Path) -> None:
    """gpt_oss: transformers draws its sinks."""
    config_of("gpt_oss").save_pretrained(tmp_path)
    first, other = random_source(str(tmp_path)), random_source(str(tmp_path), seed=1)
    torch.rand(3)
    again = random_source(str(tmp_path)).model.state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert not torch.equal(
        other.model.model.layers[0].self_attn.sinks, first.model.model.layers[0].self_attn.sinks
    )
