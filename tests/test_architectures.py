"""Every architecture through the whole pipeline: Hugging Face's tokens, in ragged, mixed and
chunked batches, by models that can tell right from wrong.

By default all of them run on the eager backend in float32, and some unlike ones on Inductor, on
ONNX Runtime, in bfloat16 and broken; the rest are marked slow. `pytest tests/test_architectures.py
-m "slow or not slow" --models-table docs/models.md` runs everything and writes the table of what
was seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from inlay import LLM, Engine, RequestOutput, SamplingParams, compile_model
from inlay.backends.step import StepRequest, build_step
from inlay.errors import RequestError, UnsupportedModelError
from inlay.lowering.guards import run_alone
from inlay.passes.check import relative_rms
from inlay.verify import compare_greedy
from tests.passes.architectures import captured as captured_toy
from tests.toys import ARCHITECTURES, ENCODERS, MULTIMODAL, REFUSED, build_toy
from tests.twins import logits_of, twins

Record = Callable[..., None]

PROMPT_LENGTHS = (1, 5, 19, 40, 2, 33, 200)
NUM_TOKENS = 24
MIN_DISTINCT = 12
UNLIKE = (
    "gemma3_text",
    "deepseek_v3",
    "llama4_text",
    "falcon-alibi",
    "bloom",
    "cohere2",
)
"""Windows, unequal KV heads, experts, chunks, ALiBi, attention found in the graph, parallel blocks,
interleaved RoPE."""

COMPILED = ("deepseek_v3", "falcon-alibi")
"""Run on Inductor by default. Windows and sinks are in test_runtime_equality.py."""

BROKEN = (*UNLIKE, "llama", "gpt2", "gemma2", "gemma3n_text", "gpt_oss", "qwen3_moe", "bert")
"""Broken by default, too: one of each kind of part that twins.py knows."""

IN_ONNX = ("gemma2", "deepseek_v3")
"""Run on ONNX Runtime by default: norms with an offset and soft-caps; experts, interleaved RoPE."""


LONG_TRACES = ("qwen3_next", "mamba2", "bamba")
"""Linear attention is traced as a long loop, for minutes."""


def slow_but(names: Iterable[str], quick: Container[str]) -> list[Any]:
    """Parameters, those that are not named quick marked as slow."""
    return [
        pytest.param(name, marks=() if name in quick else (pytest.mark.slow,)) for name in names
    ]


def on_backends(
    names: Sequence[str], unlike: tuple[str, ...], in_onnx: tuple[str, ...] = ()
) -> Any:
    quick = {"eager": names, "inductor": unlike, "onnxruntime": in_onnx}
    cases = [
        pytest.param(backend, name, id=f"{backend}-{name}", marks=case.marks)
        for backend, some in quick.items()
        for name, case in zip(names, slow_but(names, some), strict=True)
    ]
    return pytest.mark.parametrize(("backend", "name"), cases)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, 128, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS
    ]


def generate(engine: Engine, **options: int) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(engine, in_process=True, kv_cache_tokens=2048, **options) as llm:  # type: ignore[arg-type]
        return llm.generate(prompts(), params, use_tqdm=False)


def check_passes(engine: Engine) -> list[dict[str, Any]]:
    """Every expected match was made; returns the reports."""
    reports = engine.manifest["passes"]
    for report in reports:
        assert report["expected"] in (None, report["matches"]), report
        assert not report["misses"], report
    return reports


@on_backends([*ARCHITECTURES, *MULTIMODAL], COMPILED, IN_ONNX)
def test_tokens_are_those_of_hugging_face(backend: str, name: str, models_table: Record) -> None:
    with models_table(name, backend) as row:
        model = build_toy(name)
        engine = compile_model(model, backend, dtype="float32", block_size=16)
        errors = engine.manifest["errors"]
        row |= {"model_type": model.config.model_type, "error": errors["engine"]}
        row["passes"] = check_passes(engine)
        # Teacher-forced logits through capture, and through a chunked, mixed, paged run.
        assert errors["capture"] <= 1e-4
        assert errors["engine"] <= 1e-4
        ragged = generate(engine)
        # Budget and slots so small that prompts are chunked and requests join while others decode.
        chunked = generate(engine, max_num_tokens=29, max_num_seqs=3)
        for outputs in (ragged, chunked):
            comparison = compare_greedy(outputs, model, errors["engine"])
            assert comparison.num_tokens == len(PROMPT_LENGTHS) * NUM_TOKENS
            assert comparison.passed, comparison
            row |= {"equal": comparison.num_equal, "tokens": comparison.num_tokens}
        check_hidden_states(engine, model)
        distinct = [len(set(output.outputs[0].token_ids)) for output in ragged]
        assert sum(distinct) / len(distinct) >= MIN_DISTINCT


@pytest.mark.parametrize("name", slow_but([*ARCHITECTURES, *ENCODERS, *MULTIMODAL], BROKEN))
def test_a_broken_model_gives_other_tokens(name: str) -> None:
    model, captured = build_toy(name), captured_toy(name)
    token_ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(3))
    right = logits_of(captured, token_ids)
    found = twins(model, captured)
    assert len(found) >= 2
    for twin, broken in found.items():
        other = logits_of(broken, token_ids)
        assert relative_rms(right, other) > 1e-3, twin  # ten times what passes
        if name not in ENCODERS:
            assert (right.argmax(-1) != other.argmax(-1)).any(), twin


@on_backends([*ENCODERS], ())
def test_hidden_states_are_those_of_hugging_face(
    backend: str, name: str, models_table: Record
) -> None:
    with models_table(name, backend) as row:
        model = build_toy(name)
        engine = compile_model(model, backend, dtype="float32", block_size=16)
        row |= {"model_type": model.config.model_type, "error": engine.manifest["errors"]["engine"]}
        row["passes"] = check_passes(engine)
        requests = [[token % 120 + 5 for token in prompt] for prompt in prompts()]
        ours = hidden_states(engine, requests)
        for request, states in zip(requests, ours, strict=True):
            with torch.no_grad():
                expected = run_alone(model, torch.tensor([request]))
            assert relative_rms(expected, states) <= 1e-4
        check_requests(engine)


def check_requests(engine: Engine) -> None:
    """No executor checks what an encoder is given: it does so itself."""
    with (
        LLM(engine, in_process=True) as llm,
        pytest.raises(UnsupportedModelError, match=r"encoder.*does not generate"),
    ):
        llm.generate([5, 6])
    limits = engine.manifest["limits"]
    with pytest.raises(RequestError, match=r"257 tokens; the engine's max_seq_len"):
        hidden_states(engine, [[5] * 257])
    if (token := limits["padding_token"]) is not None:
        with pytest.raises(RequestError, match=f"must not hold the padding token {token}"):
            hidden_states(engine, [[5, 6], [7, token, 8]])


def check_hidden_states(engine: Engine, model: PreTrainedModel) -> None:
    """What a decoder's LM head takes is the base model's last_hidden_state, for every token."""
    base = model.model if hasattr(model, "model") else model.base_model
    requests = [prompt[:20] for prompt in prompts()[:2]]
    for request, states in zip(requests, hidden_states(engine, requests), strict=True):
        with torch.no_grad():
            expected = base(input_ids=torch.tensor([request])).last_hidden_state[0]
        assert relative_rms(expected, states) <= 1e-4


def hidden_states(engine: Engine, requests: list[list[int]]) -> list[torch.Tensor]:
    """Each request's [n, hidden], all of them in one step."""
    model = engine.load_model()
    model.allocate_kv_cache(17 * len(requests))
    batch = [
        StepRequest(ids, 0, [range(17 * index, 17 * index + 17)] * len(model.kv_groups))
        for index, ids in enumerate(requests)
    ]
    step = build_step(batch, model.limits.block_size)
    _, hidden = model.forward_hidden(step)
    return list(hidden[: step.num_tokens].split([len(ids) for ids in requests]))


def all_logits(engine: Engine, requests: list[list[int]]) -> torch.Tensor:
    """Logits after every token of each request, [tokens, vocab], many requests a step."""
    model = engine.load_model()
    model.allocate_kv_cache(128)
    rows = []
    for first in range(0, len(requests), 64):
        batch = [
            StepRequest(ids, 0, [[2 * slot, 2 * slot + 1]] * len(model.kv_groups))
            for slot, ids in enumerate(requests[first : first + 64])
        ]
        step = build_step(batch, model.limits.block_size)
        step = replace(step, logits_indices=torch.arange(step.num_tokens))
        rows.append(model.forward(step).float())
    return torch.cat(rows)


@pytest.mark.parametrize("name", slow_but([*ARCHITECTURES, *MULTIMODAL], UNLIKE))
@torch.inference_mode()
def test_bfloat16_is_as_exact_as_hugging_face_in_bfloat16(name: str, models_table: Record) -> None:
    with models_table(name, "bfloat16") as row:
        narrow = build_toy(name, torch.bfloat16)
        exact = copy.deepcopy(narrow).float()
        engine = compile_model(narrow, "eager", dtype="bfloat16")
        requests = torch.randint(3, 128, (64, 24)).tolist()
        ours = all_logits(engine, requests)
        truth, theirs = (
            model(input_ids=torch.tensor(requests)).logits.float().flatten(0, 1)
            for model in (exact, narrow)
        )
        # A rounding may choose another expert, here or there: such rows are few and far off.
        routed = any("expert" in part for part, _ in narrow.named_modules())
        share = 0.9 if routed else 1.0
        row["rms"] = relative_rms(truth, ours, share) / relative_rms(truth, theirs, share)
        row["kl"] = divergence(truth, ours, share) / divergence(truth, theirs, share)
        row |= {"rms_hf": relative_rms(truth, theirs, share), "share": share}
        assert relative_rms(truth, ours) > 0
        assert row["rms"] <= 1.25
        assert row["kl"] <= 1.25


def divergence(truth: torch.Tensor, logits: torch.Tensor, share: float) -> float:
    """KL(truth || logits), mean over the share of rows where it is least, in nats."""
    each = F.kl_div(
        logits.log_softmax(-1), truth.log_softmax(-1), log_target=True, reduction="none"
    )
    return float(each.sum(-1).sort().values[: int(share * len(each))].mean())


@pytest.mark.parametrize("name", slow_but(REFUSED, REFUSED.keys() - set(LONG_TRACES)))
def test_what_is_not_attention_is_refused_by_name(name: str, models_table: Record) -> None:
    with models_table(name, "eager") as row:
        model = build_toy(name)
        row["model_type"] = model.config.model_type
        with pytest.raises(UnsupportedModelError) as caught:
            compile_model(model, "eager", dtype="float32")
        row["refused"] = str(caught.value)
        assert f"architecture {model.config.model_type!r} cannot be captured" in str(caught.value)
        assert "what would be needed" in str(caught.value)
