"""RoPE whose frequencies depend on the batch: the engine's are those for its longest request."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from inlay import LLM, SamplingParams, compile_model
from inlay.lowering.capture import build_shell
from inlay.lowering.loading import load_source
from inlay.lowering.rope import FIXED, data_dependent, fix_rope
from tests.toys import build_toy

ORIGINAL = 64
"""Tokens that the toys are first trained for; both go up to 256."""


def toy(kind: str) -> PreTrainedModel:
    if kind == "dynamic":
        return build_toy("llama-dynamic", max_position_embeddings=ORIGINAL)
    factors = build_toy("phi3-longrope").config.rope_parameters
    options = {"original_max_position_embeddings": ORIGINAL}
    return build_toy("phi3-longrope", **options, rope_parameters={**factors, **options})


def rotary(model: Any) -> Any:
    return model.model.rotary_emb


def tables_of_transformers(model: PreTrainedModel, length: int) -> tuple[torch.Tensor, ...]:
    """cos and sin that the model itself makes for a request of this length."""
    where = torch.arange(length)[None]
    with torch.no_grad():
        return rotary(model)(torch.zeros(1, 1, 1), where)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("max_seq_len", [3, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 200])
def test_frequencies_are_those_of_transformers_at_max_seq_len(kind: str, max_seq_len: int) -> None:
    model = toy(kind)
    shell = build_shell(model, None, max_seq_len=max_seq_len)
    expected = tables_of_transformers(toy(kind), max_seq_len)
    for length in (3, max_seq_len, 250, 3):  # whatever is asked, and in whatever order
        ours = tables_of_transformers(shell, length)
        for one, other in zip(ours, expected, strict=True):
            common = min(length, max_seq_len)
            # Frequencies rounded to float32 at other places, times a position of up to 200.
            torch.testing.assert_close(one[:, :common], other[:, :common], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_short_and_long_are_not_the_same(kind: str) -> None:
    short, long = (build_shell(toy(kind), None, max_seq_len=n) for n in (ORIGINAL, ORIGINAL + 136))
    assert not torch.allclose(rotary(short).inv_freq, rotary(long).inv_freq)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_users_model_keeps_its_own(kind: str) -> None:
    model = toy(kind)
    buffer, before = rotary(model).inv_freq, rotary(model).inv_freq.clone()
    shell = build_shell(model, None, max_seq_len=200)
    with torch.no_grad():
        shell(input_ids=torch.arange(100)[None])
    assert rotary(model).inv_freq is buffer
    assert torch.equal(buffer, before)
    assert rotary(model).rope_type == kind
    assert rotary(shell).rope_type == FIXED


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_that_has_run_already(kind: str) -> None:
    used = toy(kind)
    with torch.no_grad():
        used(input_ids=torch.arange(100)[None])  # transformers notes this in the module
    for max_seq_len in (ORIGINAL, 200):
        ours = build_shell(used, None, max_seq_len=max_seq_len)
        expected = build_shell(toy(kind), None, max_seq_len=max_seq_len)
        assert torch.equal(rotary(ours).inv_freq, rotary(expected).inv_freq)


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "llama-llama3", "llama-linear"])
def test_other_kinds_are_left(name: str) -> None:
    model = build_toy(name)
    kind, buffer = rotary(model).rope_type, rotary(model).inv_freq
    fix_rope(model, 200)
    assert rotary(model).rope_type == kind
    assert rotary(model).inv_freq is buffer
    assert data_dependent(model) == []


def test_kinds_by_layer() -> None:
    """Gemma 3 and its like have one RoPE for each type of layer."""
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    dynamic = {**rope, "rope_type": "dynamic", "factor": 4.0}
    parameters = {"sliding_attention": rope, "full_attention": dynamic}
    options = {"rope_parameters": parameters, "max_position_embeddings": ORIGINAL}
    model = build_toy("gemma3_text", **options)
    assert data_dependent(model) == ["dynamic"]
    shell = build_shell(model, None, max_seq_len=200)
    assert rotary(shell).rope_type == {"sliding_attention": "default", "full_attention": FIXED}
    names = [f"{kind}_inv_freq" for kind in parameters]
    changed = [
        not torch.equal(getattr(rotary(shell), name), getattr(rotary(model), name))
        for name in names
    ]
    assert changed == [False, True]


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False, use_cache=False
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("max_seq_len", "lengths"),
    [(ORIGINAL, (3, 40, 17)), (200, (ORIGINAL + 1, 100, 70))],
    ids=["short", "long"],
)
def test_tokens_where_transformers_uses_the_same_factors(
    max_seq_len: int, lengths: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model = toy("longrope")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]
    with caplog.at_level(logging.WARNING, "inlay"):
        engine = compile_model(model, "eager", dtype="float32", max_seq_len=max_seq_len)
    message = f"RoPE of type longrope: the engine takes the frequencies for {max_seq_len} tokens"
    assert message in caplog.text
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    llm = LLM(engine, in_process=True, kv_cache_tokens=1024)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    ours = [output.outputs[0].token_ids for output in outputs]
    assert ours == [greedy(model, prompt, 20) for prompt in prompts]
    assert len({token for tokens in ours for token in tokens}) > 12


def test_the_other_factors_would_give_other_tokens() -> None:
    model = toy("longrope")
    prompt = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        short, long = (
            build_shell(model, None, max_seq_len=n)(input_ids=prompt).logits.argmax(-1)
            for n in (ORIGINAL, 200)
        )
    assert int((short != long).sum()) > 3


def test_a_model_of_another_dtype_is_still_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = toy("longrope")
    before = rotary(model).inv_freq.clone()
    converted = load_source(model, "bfloat16").model
    assert data_dependent(converted) == ["longrope"]
    with torch.no_grad():
        converted(input_ids=torch.arange(100)[None])
    assert torch.equal(rotary(model).inv_freq, before), "transformers writes into the buffer"
    with caplog.at_level(logging.WARNING, "inlay"):
        compile_model(model, "eager", dtype="bfloat16", max_seq_len=200)
    assert "RoPE of type longrope" in caplog.text


def test_nothing_is_said_of_other_kinds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "inlay"):
        compile_model(build_toy("llama-yarn", layers=1), "eager", dtype="float32")
    assert "RoPE of type" not in caplog.text
