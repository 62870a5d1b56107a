"""Windows that are longer than any request of the guards: what transformers masks decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay import LLM, SamplingParams, compile_model
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
    outputs = LLM(engine, kv_cache_tokens=1024).generate([prompt], params, use_tqdm=False)
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
    masks = masks_of(share_tensors(model, PROBE, other=config).eval())
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
