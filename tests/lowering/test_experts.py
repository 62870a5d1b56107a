"""Experts modules of transformers: read by what they compute, and captured as one op each."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from inlay import LLM, SamplingParams, compile_model
from inlay.errors import UnsupportedModelError
from inlay.lowering.capture import capture
from inlay.lowering.experts import EXPERTS, OPTIONS, read_experts, register_experts
from inlay.lowering.random_weights import randomise
from inlay.passes.check import relative_rms
from inlay.passes.graph import bind, calls

NUM_EXPERTS, HIDDEN, INNER = 5, 24, 10

# Float32 sums in another order.
TOLERANCE = 1e-6


class AnyConfig(SimpleNamespace):
    """Answers what an experts class asks of its config by what the attribute's name says."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        kinds = {
            "limit": 0.9, "alpha": 1.7, "softcap": 1.5, "eps": 1e-3, "latent": None,
            "zero_expert": 0, "intermediate": INNER, "ffn": INNER, "act": "silu",
            "expert": NUM_EXPERTS, "hidden": HIDDEN,
        }  # fmt: skip
        for part, value in kinds.items():
            if part in name and not name.startswith("__"):
                return value
        raise AttributeError(name)


def build(model_type: str, name: str, **config: Any) -> Any:
    """An experts module of this class with random weights."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    experts = getattr(module, name)(AnyConfig(**config))
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.5
    return experts.eval()


def routing(num_tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens for all experts but the last."""
    index = torch.rand(num_tokens, NUM_EXPERTS - 1).argsort(1)[:, :3]
    return torch.randn(num_tokens, HIDDEN), index, torch.rand(num_tokens, 3)


@torch.no_grad()
def compare(experts: Any, num_tokens: int = 9) -> float:
    """How far the op is from the module's own loop; leaves the module with what was read of it."""
    arguments = routing(num_tokens)
    expected = experts(*arguments)
    assert read_experts(torch.nn.ModuleDict({"experts": experts})) == ["experts"]
    if hasattr(experts, "config"):
        experts.config._experts_implementation = EXPERTS
    return relative_rms(expected, experts(*arguments))


# Module, class, and the options that are not an ordinary SwiGLU's: one of every kind of layout and
# gate that transformers has, the last two outside its registry.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "MixtralExperts", {}),
    ("beam", "BeamExperts", {}),
    ("aria", "AriaExperts", {"transposed": True}),
    ("lfm2_moe", "Lfm2MoeExperts", {}),
    ("deepseek_v4", "DeepseekV4Experts", {"gate_limit": 0.9, "up_limit": 0.9}),
    ("hy_v4", "HYV4Experts", {"gate_limit": 0.9, "up_limit": 0.9}),
    (
        "gpt_oss",
        "GptOssExperts",
        {
            "gate_limit": 0.9, "up_limit": 0.9, "alpha": 1.7, "up_offset": 1.0,
            "transposed": True, "interleaved": True,
        },
    ),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        {"gate_limit": 0.9, "up_limit": 0.9, "alpha": 1.7, "up_offset": 1.0, "transposed": True},
    ),
    (
        "minimax_m3_vl",
        "MiniMaxM3VLExperts",
        {"gate_limit": 0.9, "up_limit": 0.9, "alpha": 1.7, "up_offset": 1.0},
    ),
    ("inkling2", "Inkling2Experts", {"gate_softcap": 1.5, "up_softcap": 1.5}),
    ("muse_spark", "MuseSparkExperts", {"norm_eps": 1e-3}),
    ("nemotron_h", "NemotronHExperts", {"gated": False}),
    ("longcat_flash", "LongcatFlashExperts", {}),
    ("step3p7", "Step3p7Experts", {}),
]  # fmt: skip
NEUTRAL = {
    "activation": "silu", "gated": True, "transposed": False, "interleaved": False, "alpha": 1.0,
    "up_offset": 0.0, "limit_activated": False,
}  # fmt: skip


def experts_of(model_type: str, name: str, **config: Any) -> Any:
    """As build; a class that this transformers does not have yet skips the test."""
    try:
        return build(model_type, name, **config)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name}")


@pytest.mark.parametrize(("model_type", "name", "options"), KINDS, ids=[k[1] for k in KINDS])
def test_kinds(model_type: str, name: str, options: dict[str, Any]) -> None:
    register_experts()
    experts = experts_of(model_type, name)
    assert compare(experts) < TOLERANCE
    read = getattr(experts, OPTIONS)
    assert {k: v for k, v in read.items() if NEUTRAL.get(k) != v} == options
    # A known-bad twin, read as the other layout, is off by far more than the tolerance.
    if read["gated"]:
        arguments = routing()
        with torch.no_grad():
            expected = experts(*arguments)
            setattr(experts, OPTIONS, {**read, "interleaved": not read["interleaved"]})
            assert relative_rms(expected, experts(*arguments)) > 0.1


@pytest.mark.parametrize("name", ["step3p7"])
def test_a_limit_after_the_activation(name: str) -> None:
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    experts = module.Step3p7Experts(AnyConfig(), swiglu_limit=0.4)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.5
    assert compare(experts) < TOLERANCE
    read = getattr(experts, OPTIONS)
    assert (read["gate_limit"], read["limit_activated"], read["up_limit"]) == (0.4, True, 0.4)


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"), ("relu2", "relu2"), ("sigmoid", "sigmoid"), ("tanh", "tanh"),
        ("linear", "linear"), ("silu", "silu"), ("quick_gelu", "silu"),
        ("relu6", "relu"), ("gelu_10", "gelu"),  # with a limit
    ],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_activations(model_type: str, act: str, activation: str) -> None:
    register_experts()
    name = {"mixtral": "MixtralExperts", "nemotron_h": "NemotronHExperts"}[model_type]
    experts = build(model_type, name, hidden_act=act, mlp_hidden_act=act)
    assert compare(experts, num_tokens=1) < TOLERANCE
    read = getattr(experts, OPTIONS)
    assert (read["activation"], read["alpha"]) == (activation, 1.702 if act[0] == "q" else 1.0)


@pytest.mark.parametrize("act", ["mish", "hardswish", "xielu", "sqrtsoftplus"])
def test_an_unknown_activation_is_refused_by_name(act: str) -> None:
    register_experts()
    experts = build("mixtral", "MixtralExperts", hidden_act=act)
    with pytest.raises(UnsupportedModelError, match=r"experts \(.*MixtralExperts\).*gelu"):
        read_experts(torch.nn.ModuleDict({"experts": experts}))


def test_a_gate_that_is_no_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register_experts()
    experts = build("mixtral", "MixtralExperts")
    monkeypatch.setattr(
        type(experts), "_apply_gate", lambda self, x: x[..., :INNER] + x[..., INNER:].sigmoid()
    )
    with pytest.raises(UnsupportedModelError, match="MixtralExperts"):
        read_experts(torch.nn.ModuleDict({"experts": experts}))


def test_a_loop_that_does_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the registry only the numbers count: here half of them."""
    experts = experts_of("longcat_flash", "LongcatFlashExperts")
    original = type(experts).forward

    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
        return 0.5 * original(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(type(experts), "forward", forward)
    with pytest.raises(UnsupportedModelError, match="loops over its experts itself"):
        read_experts(torch.nn.ModuleDict({"experts": experts}))


def test_identity_experts_are_refused() -> None:
    experts = experts_of("longcat_flash", "LongcatFlashExperts", zero_expert_num=2)
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        read_experts(torch.nn.ModuleDict({"experts": experts}))


def test_another_norm_after_the_experts_is_refused() -> None:
    register_experts()
    experts = experts_of("muse_spark", "MuseSparkExperts")
    experts.post_expert_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-3)
    torch.nn.init.normal_(experts.post_expert_norm.weight)
    with pytest.raises(UnsupportedModelError, match="post_expert_norm"):
        read_experts(torch.nn.ModuleDict({"experts": experts}))


# --- whole models ----------------------------------------------------------------------------

COMMON: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 48, "moe_intermediate_size": 40, "num_experts_per_tok": 3,
    "vocab_size": 128, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"num_experts": 6, "head_dim": 16, "vocab_size": 512},
    "gpt_oss": {"num_local_experts": 5, "head_dim": 16, "sliding_window": 8},
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
        "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 12,
    },
}  # fmt: skip
PROMPTS = [[3, 17, 5, 99, 21, 7, 64, 12, 90, 33], [8, 5, 101], list(range(20, 60))]


def build_model(name: str) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **COMMON | MODELS[name])
    return randomise(AutoModelForCausalLM.from_config(config).eval())


@torch.no_grad()
def hugging_face_tokens(model: PreTrainedModel) -> list[list[int]]:
    options = {"max_new_tokens": 16, "do_sample": False}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    outputs = [model.generate(prompt, **options)[0, prompt.shape[1] :] for prompt in prompts]
    return [output.tolist() for output in outputs]


def tokens(engine: Any) -> list[list[int]]:
    llm = LLM(engine, in_process=True)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0.0))
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_one_op_per_experts_module(name: str) -> None:
    model = build_model(name)
    captured = capture(model, 64)
    found = calls(captured.graph, torch.ops.inlay.experts.default)
    modules = [m for m in model.modules() if hasattr(m, "is_transposed")]
    assert len(found) == len(modules) == (1 if name == "deepseek_v3" else 2)
    for call in found:
        assert all(bind(call)[weight].op == "placeholder" for weight in ("up", "down"))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_checkpoints_of_separate_experts(name: str, tmp_path: Path) -> None:
    """save_pretrained writes an expert a tensor; loading must put them together again."""
    model = build_model(name)
    model.save_pretrained(tmp_path)
    files = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    stored = b"".join(path.read_bytes()[:100_000] for path in files)
    assert b".experts.3." in stored
    expected = hugging_face_tokens(model)
    assert all(len(set(row)) >= 10 for row in expected)
    engine = compile_model(str(tmp_path), "eager")
    assert tokens(engine) == expected
