"""Windows that are longer than any request of the guards: what transformers masks decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inlay import LLM, SamplingParams, compile_model
from inlay.errors import UnsupportedModelError
from inlay.lowering.attention import ATTENTION
from inlay.lowering.capture import capture, share_tensors
from inlay.lowering.support import NotCapturableError
from inlay.lowering.windows import PROBE, check_windows, masks_of, narrowed
from inlay.passes.graph import bind, calls
from inlay.verify import compare_greedy
from tests.toys import build_toy

ATTENTIONS = torch.ops.inlay.attention.default


def windows(graph: Any) -> list[int]:
    return [bind(node)["window"] for node in calls(graph, ATTENTIONS)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistral", [300, 300]),
        ("phimoe", [300, 300]),  # in its mask, not in the call of its attention
        ("olmoe", [0, 0]),  # in the call of its attention, not in its mask
    ],
)
def test_the_mask_decides(name: str, expected: list[int]) -> None:
    model = build_toy(name, sliding_window=300, max_position_embeddings=512, layers=2)
    assert windows(capture(model, 2048).graph) == expected
    engine = compile_model(model, "eager", dtype="float32")
    prompt = torch.randint(3, 120, (330,), generator=torch.Generator().manual_seed(1)).tolist()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(engine, in_process=True, kv_cache_tokens=1024)
    outputs = llm.generate([prompt], params, use_tqdm=False)
    comparison = compare_greedy(outputs, model, engine.manifest["errors"]["engine"])
    assert comparison.passed, comparison


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gemma2", {"sliding_window": 300}),
        ("modernbert", {"local_attention": 600}),
        ("llama4_text", {"attention_chunk_size": 300}),
    ],
)
def test_a_wrong_window_is_found(name: str, options: dict[str, Any]) -> None:
    model = build_toy(name, max_position_embeddings=1024, **options)
    graph = capture(model, 2048).graph
    config, sizes = narrowed(model.config, 1024)
    assert sizes == {next(iter(options.values())): 16}
    masks = masks_of(share_tensors(model, PROBE, other=config).eval(), 1024)
    check_windows(graph, masks, sizes)
    name = "chunk" if "llama4" in name else "window"
    node = next(n for n in calls(graph, ATTENTIONS) if bind(n)[name])
    index = [argument.name for argument in node.target._schema.arguments].index(name)
    for wrong in (0, bind(node)[name] + 2):
        node.update_arg(index, wrong)
        with pytest.raises(NotCapturableError, match=r"module .* calls attention with .* mask is"):
            check_windows(graph, masks, sizes)
    with pytest.raises(NotCapturableError, match=r"called \d times by transformers"):
        check_windows(graph, masks[1:], sizes)


def test_a_window_that_no_request_fills() -> None:
    model = build_toy("mistral", sliding_window=4096, max_position_embeddings=512)
    assert narrowed(model.config, 512)[1] == {4096: 0}
    assert set(windows(capture(model, 2048).graph)) == {4096}


def test_the_users_model_and_config_are_left_alone() -> None:
    model = build_toy("mistral", sliding_window=300)
    config, _ = narrowed(model.config, 1024)
    assert (config.sliding_window, model.config.sliding_window) == (16, 300)
    capture(model, 2048)
    assert model.config.sliding_window == 300
    assert model.config._attn_implementation not in (ATTENTION, PROBE)


def test_a_window_that_the_plain_graph_cannot_tell() -> None:
    """2048 tokens are tried at most: what begins beyond them must not be taken for nothing."""
    options = {"sliding_window": 2500, "max_position_embeddings": 4096, "layers": 1}
    with pytest.raises(UnsupportedModelError, match="the mask is made with the number 2500"):
        capture(build_toy("phimoe", **options), 512)
    assert windows(capture(build_toy("phimoe", **options), 512, 2048).graph) == [0]
    assert windows(capture(build_toy("mistral", **options), 512).graph) == [2500]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"n_positions": 32}),
        ("opt", {"max_position_embeddings": 40}),
        ("bert", {"max_position_embeddings": 32}),
        ("modernbert", {"local_attention": 4200, "max_position_embeddings": 4096}),
        ("mistral", {"sliding_window": 600, "max_position_embeddings": 512}),
    ],
)
def test_few_positions_and_wide_windows(name: str, options: dict[str, int]) -> None:
    compile_model(build_toy(name, **options), "eager", dtype="float32")


def test_a_tensor_that_decides_what_is_seen() -> None:
    """Sparse attention: transformers makes its mask for its own implementations only."""
    config = AutoConfig.for_model(
        "minimax_m3_vl_text",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
        num_local_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=2048,
        index_topk_blocks=1,
        index_local_blocks=0,
        max_position_embeddings=4096,
        layer_types=["minimax_m3_sparse", "full_attention"],
    )
    with pytest.raises(UnsupportedModelError, match=r"Attention calls attention with a tensor blo"):
        capture(AutoModelForCausalLM.from_config(config).eval(), 512)
