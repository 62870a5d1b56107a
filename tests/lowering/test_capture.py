"""The captured graph: its attention calls, its numbers at any length, its weights, and the user's
model, which stays as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Interpreter
from transformers import AttentionInterface, PreTrainedModel

from inlay.errors import UnsupportedModelError
from inlay.lowering import attention as module
from inlay.lowering.attention import ATTENTION
from inlay.lowering.capture import build_shell, capture
from inlay.lowering.export import Captured, export_row
from inlay.passes.graph import bind, calls, placeholder_key
from tests.toys import TOYS, build_toy

LAYERS = {name: 3 if name in ("gemma2", "gpt2") else 2 for name in TOYS}


@functools.cache
def captured_toy(name: str) -> tuple[PreTrainedModel, Captured]:
    model = build_toy(name)
    return model, capture(model, max_num_tokens=64)


def attentions(captured: Captured) -> list[dict[str, Any]]:
    return [bind(node) for node in calls(captured.graph, torch.ops.inlay.attention.default)]


def run(captured: Captured, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, T, vocab] of one request, input_ids [1, T]."""
    values = {**captured.sources, "input_ids": input_ids}
    values["position_ids"] = torch.arange(input_ids.shape[1])[None]
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    with torch.no_grad():
        output = Interpreter(captured.graph).run(
            *[values[placeholder_key(p)] for p in placeholders]
        )
    return output[0] if isinstance(output, tuple | list) else output


@pytest.mark.parametrize("name", sorted(TOYS))
def test_every_layer_calls_attention_once_with_its_own_arguments(name: str) -> None:
    _, captured = captured_toy(name)
    found = attentions(captured)
    assert [call["layer"] for call in found] == list(range(LAYERS[name]))
    windows = {"mistral": [8, 8], "gemma2": [8, 0, 8]}.get(name, [0] * LAYERS[name])
    assert [call["window"] for call in found] == windows
    assert {call["softcap"] for call in found} == {50.0 if name == "gemma2" else 0.0}
    assert all(call["causal"] for call in found)
    head_dim = 24 if name in ("gemma2", "qwen3") else 16
    assert {call["q"].meta["val"].shape[1:] for call in found} == {(4, head_dim)}
    assert [call["scale"] for call in found] == pytest.approx([head_dim**-0.5] * LAYERS[name])


@pytest.mark.parametrize("name", sorted(TOYS))
def test_numbers_at_any_length(name: str) -> None:
    model, captured = captured_toy(name)
    # Beyond the window of 8, beyond the example that was traced (24), and the least.
    for length in (2, 3, 24, 61):
        ids = torch.randint(0, 128, (1, length))
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(run(captured, ids), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_weights_are_the_models_own_memory(name: str) -> None:
    model, captured = captured_toy(name)
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    places = captured.graph.graph.find_nodes(op="placeholder")
    names = [node.meta["weight"] for node in places if "weight" in node.meta]
    assert sorted(names) == sorted(captured.sources)
    # What is made while tracing, such as a constant, is at most a few numbers.
    large = [t for t in captured.sources.values() if t.numel() > 64]
    assert large
    assert all(tensor.data_ptr() in own for tensor in large)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_users_model_is_not_changed(implementation: str) -> None:
    model = build_toy("mistral", torch.bfloat16)
    model.set_attn_implementation(implementation)
    model.train()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    parameters = [id(p) for p in model.parameters()]
    capture(model, 64)
    after = model.state_dict()
    assert model.config.to_dict() == before[1]
    assert model.config._attn_implementation == implementation
    assert model.model.layers[0].self_attn.config._attn_implementation == implementation
    assert model.training
    assert [id(p) for p in model.parameters()] == parameters
    assert list(after) == list(before[0])
    for name, value in after.items():
        assert value.dtype == before[0][name].dtype
        assert torch.equal(value, before[0][name])
    assert all(p.requires_grad for p in model.parameters())


def test_a_shell_computes_what_the_model_computes() -> None:
    model = build_toy("gemma2", tie_word_embeddings=True)
    ids = torch.arange(20)[None]
    shell = build_shell(model, "eager")
    assert shell.lm_head.weight is shell.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(shell(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def attention() -> Iterator[Callable[[Any], None]]:
    """Puts another function under our name, and ours back at the end."""
    yield functools.partial(AttentionInterface.register, ATTENTION)
    AttentionInterface.register(ATTENTION, module._attention_forward)


def around_ours(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


def test_a_layer_that_goes_around_the_registry_is_found_in_the_graph(
    attention: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        other = around_ours if self.layer_idx == 1 else module._attention_forward
        return other(self, *args, **kwargs)

    attention(forward)
    with caplog.at_level("INFO", "inlay"):
        captured = capture(build_toy("llama"), 64)
    assert "1 of its 2 layers do not call attention: model.layers.1 (LlamaAttention)" in caplog.text
    assert len(attentions(captured)) == 2
    (report,) = [report for report in captured.reports if report.name == "fuse_attention"]
    assert report.matches == report.expected == 2


def test_a_layer_without_attention_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"'lfm2' cannot be captured: 1 of its 2 layers do not call attention: "
        r"model\.layers\.0 \(Lfm2ShortConv, Conv1d\)",
    ):
        capture(build_toy("lfm2"), 64)


def test_no_attention_at_all() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention is in its graph"):
        capture(build_toy("llama", layers=0), 64)


def test_a_length_that_is_counted_in_python() -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"holds for no other number: .*MambaMixer\) at .*modeling_mamba\.py:\d+",
    ):
        capture(build_toy("mamba"), 64)


def test_another_path_for_long_requests() -> None:
    # BigBird's sparse attention begins at (5 + 2 random blocks) * block size = 44 tokens.
    model = build_toy("big_bird", block_size=4, num_random_blocks=3)
    with pytest.raises(UnsupportedModelError, match=r"another path from 4\d tokens on"):
        capture(model, 64)


def test_what_export_cannot_do_is_said(attention: Callable[[Any], None]) -> None:
    def forward(self: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if query.sum() > 0:  # depends on data
            query = -query
        return module._attention_forward(self, query, *args, **kwargs)

    attention(forward)
    shell = build_shell(build_toy("llama", layers=1), ATTENTION)
    with pytest.raises(
        UnsupportedModelError,
        match=r"cannot be exported: module model\.layers\.0\.self_attn \(LlamaAttention\) at "
        r".*tests/lowering/test_capture\.py:\d+, `if query\.sum\(\) > 0:.*what would be needed",
    ):
        export_row(shell, 64)
    assert not module._context.__dict__, "a failed capture keeps its tensors alive"
