"""What is refused by name before anything is captured, and what is harmless and must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from inlay.errors import UnsupportedModelError
from inlay.lowering.capture import build_shell, capture
from inlay.lowering.loading import load_source
from inlay.lowering.support import check_supported
from tests.toys import build_toy


class Wrapped(nn.Module):
    """As PEFT's: a module of its own around the model, which passes on its attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.config = model.config

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class LoraLinear(nn.Linear):
    """As PEFT's: stands where a linear layer stood."""


class Subclass(LlamaForCausalLM):
    """A user's own model."""


def llama() -> PreTrainedModel:
    return build_toy("llama", layers=1)


def refuse(model: object, message: str) -> None:
    """By the door that in-memory models come in, whatever dtype is asked for."""
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(UnsupportedModelError, match=message):
            load_source(model, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "bert", "qwen2_5_vl"])
def test_a_model_as_its_config_says(name: str) -> None:
    model = build_toy(name)
    check_supported(model)
    build_shell(model, "eager")


def test_an_encoder_and_decoder() -> None:
    config = T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    refuse(T5ForConditionalGeneration(config), r"has neither for a 't5' model of class .*T5For")


@pytest.mark.parametrize(
    "cls",
    [
        LlamaModel,
        LlamaForSequenceClassification,
        Subclass,
        GPT2Model,
        GPT2ForSequenceClassification,
        GPT2DoubleHeadsModel,
    ],
)
def test_another_class_of_a_supported_architecture(cls: type[PreTrainedModel]) -> None:
    name, expected = ("llama", "LlamaForCausalLM")
    if cls.__name__.startswith("GPT2"):
        name, expected = ("gpt2", "GPT2LMHeadModel")
    model = cls(build_toy(name, layers=1).config)
    refuse(
        model,
        rf"causal LM .*\({expected}\), got a '{name}' model of class .*\.{cls.__name__}; load it",
    )


@pytest.mark.parametrize("model", [None, 42, nn.Linear(2, 2), Wrapped(llama())])
def test_what_is_no_transformers_model(model: object) -> None:
    refuse(model, f"must be a transformers PreTrainedModel, got {type(model).__name__}.*merge")


def replace_forward(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)


def adapter(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj = LoraLinear(64, 112, bias=False)


def parametrisation(model: PreTrainedModel) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def number_added(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.attn_logit_softcapping = 0.5


def norm_removed(model: PreTrainedModel) -> None:
    model.model.norm = nn.Identity()


def module_within(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Dropout())


def other_scale(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def other_epsilon(model: PreTrainedModel) -> None:
    model.model.norm.variance_epsilon = 0.1


def layer_removed(model: PreTrainedModel) -> None:
    model.model.layers = model.model.layers[:0]


def layer_added(model: PreTrainedModel) -> None:
    model.model.layers.append(build_toy("llama", layers=1).model.layers[0])


def buffer_added(model: PreTrainedModel) -> None:
    model.model.norm.register_buffer("offset", torch.ones(64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_forward, r"model\.layers\.0\.mlp .*LlamaMLP\) has a replaced forward, which"),
        (hook, r"model\.layers\.0\.mlp .*LlamaMLP\) has forward hooks, which"),
        (pre_hook, r"model\.layers\.0\.mlp .*LlamaMLP\) has forward hooks, which"),
        (adapter, r"mlp\.up_proj .*LoraLinear\) is not one of transformers' or torch's own.*merge"),
        (parametrisation, r"mlp\.up_proj .*ParametrizedLinear\) is not one of"),
        (other_activation, r"mlp\.act_fn is not what.*class is 'GELU' instead of 'SiLUActivation'"),
        (
            number_added,
            r"self_attn is not what.*its attn_logit_softcapping is 0\.5 instead of None",
        ),
        (norm_removed, r"model\.norm is not what.* 'Identity' instead of 'LlamaRMSNorm'"),
        (module_within, r"mlp\.up_proj is not what.* 'Sequential' instead of 'Linear'"),
        (other_scale, r"self_attn is not what.*its scaling is 0\.5 instead of 0\.25"),
        (other_epsilon, r"norm is not what.*its variance_epsilon is 0\.1 instead of 1e-06"),
        (layer_removed, r"model\.layers\.0 is not what.*class is None instead of 'LlamaDecoder"),
        (layer_added, r"model\.layers\.1 is not what.*'LlamaDecoderLayer' instead of None"),
        (buffer_added, r"model\.norm is not what.*tensors is \['offset', 'weight'\] instead of"),
    ],
)
def test_a_model_changed_by_hand(change: Callable[[PreTrainedModel], None], message: str) -> None:
    model = llama()
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        capture(model, 64)


def test_a_config_changed_after_the_model_was_made() -> None:
    model = llama()
    model.config.rms_norm_eps = 0.5
    with pytest.raises(UnsupportedModelError, match=r"epsilon is 1e-06 instead of 0\.5"):
        build_shell(model, "eager")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_transformers_itself_leaves_on_a_model_is_harmless() -> None:
    model = llama()
    model.resize_token_embeddings(130)
    model.generate(torch.arange(4)[None], max_new_tokens=2)
    model.set_attn_implementation("eager")
    model(torch.arange(4)[None], output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules()), "nothing was left: pointless"
    model.gradient_checkpointing_enable()
    model.train().requires_grad_(False)
    check_supported(model)
    build_shell(model, "eager")


def test_biases_that_a_config_does_not_have_are_taken_along() -> None:
    model = llama()
    projection = model.model.layers[0].mlp.up_proj
    projection.bias = nn.Parameter(torch.randn(112))
    shell = build_shell(model, "eager")
    assert shell.model.layers[0].mlp.up_proj.bias is projection.bias


def test_quantized_checkpoints() -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refuse(
        model,
        r"quantized with 'gptq' \(quantization_config\) in memory are not supported; give the",
    )


def test_functions_changed_by_hand() -> None:
    model = build_toy("mixtral", layers=1)
    experts = model.model.layers[0].mlp.experts
    experts._apply_gate = experts._apply_gate
    refuse(model, r"mlp\.experts .* has a replaced _apply_gate, which a graph would lose")
    model = build_toy("gemma", layers=1)
    capture(model, 64)
    model.model.layers[0].mlp.act_fn.act = torch.tanh
    with pytest.raises(
        UnsupportedModelError, match=r"act_fn is not what.*its act is '.*tanh' instead of"
    ):
        capture(model, 64)


def test_what_changes_nothing_in_evaluation_may_be_changed() -> None:
    model = llama()
    model.config.pad_token_id, model.config.attention_dropout = 2, 0.1
    capture(model, 64)
    roberta = build_toy("roberta")
    roberta.config.pad_token_id = 3  # it counts positions by it
    with pytest.raises(UnsupportedModelError, match="its padding_idx is 1 instead of 3"):
        capture(roberta, 64)
    albert = AutoConfig.for_model("albert", hidden_size=64, num_attention_heads=4, vocab_size=128)
    albert.intermediate_size, albert.num_hidden_layers, albert.embedding_size = 112, 2, 32
    capture(AutoModel.from_config(albert).eval(), 64)  # keeps its implementation's name


def test_a_pooler_that_nobody_reads() -> None:
    esm = AutoConfig.for_model(
        "esm",
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=112,
        vocab_size=128,
        pad_token_id=1,
        mask_token_id=3,
        position_embedding_type="rotary",
    )
    capture(AutoModel.from_config(esm).eval(), 64)
