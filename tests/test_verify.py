"""Tokens against Hugging Face: equal, excused by a near tie, or wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from inlay.runtime.outputs import CompletionOutput, RequestMetrics, RequestOutput
from inlay.verify import GAP_FACTOR, TokenComparison, compare_greedy
from tests.toys import build_toy


def output(prompt: list[int], generated: list[int]) -> RequestOutput:
    completion = SimpleNamespace(token_ids=generated)
    assert {"token_ids"} <= set(CompletionOutput.__dataclass_fields__)
    return RequestOutput("r", None, prompt, [completion], True, RequestMetrics(0.0))  # type: ignore[list-item]


@pytest.fixture(scope="module")
def generated() -> tuple[list[int], list[int], torch.Tensor]:
    """A prompt, Hugging Face's greedy tokens, and the logits that it chose them by."""
    model = build_toy("llama")
    prompt, ids = [5, 6, 7], [5, 6, 7]
    rows = []
    with torch.no_grad():
        for _ in range(12):
            rows.append(model(torch.tensor([ids])).logits[0, -1])
            ids = [*ids, int(rows[-1].argmax())]
    return prompt, ids[3:], torch.stack(rows)


def test_a_request_that_failed_is_not_right() -> None:
    failed = replace(output([5, 6, 7], []), error=RuntimeError("out of luck"))
    with pytest.raises(RuntimeError, match="out of luck"):
        compare_greedy([failed], build_toy("llama"), 1e-6)


def test_equal_tokens(generated: tuple[list[int], list[int], torch.Tensor]) -> None:
    prompt, tokens, _ = generated
    comparison = compare_greedy([output(prompt, tokens)] * 2, build_toy("llama"), 1e-6)
    assert comparison == TokenComparison(24, 24, 0)
    assert comparison.passed


def test_a_wrong_token_is_wrong_and_what_follows_it_is_not(
    generated: tuple[list[int], list[int], torch.Tensor],
) -> None:
    prompt, tokens, _ = generated
    model = build_toy("llama")
    changed = [*tokens[:4], (tokens[4] + 1) % 128]
    with torch.no_grad():
        for _ in range(3):
            changed.append(int(model(torch.tensor([prompt + changed])).logits[0, -1].argmax()))
    comparison = compare_greedy([output(prompt, changed)], model, 1e-6)
    assert (comparison.num_tokens, comparison.num_equal, comparison.num_wrong) == (8, 7, 1)
    assert not comparison.passed


def test_the_second_best_is_excused_only_within_the_error(
    generated: tuple[list[int], list[int], torch.Tensor],
) -> None:
    prompt, tokens, logits = generated
    top = logits[-1].topk(2)
    second = [*tokens[:-1], int(top.indices[1])]
    share = float((top.values[0] - top.values[1]) / logits.square().mean().sqrt()) / GAP_FACTOR
    model = build_toy("llama")
    near = compare_greedy([output(prompt, second)], model, 1.1 * share)
    assert (near.num_excused, near.num_wrong) == (1, 0)
    far = compare_greedy([output(prompt, second)], model, 0.9 * share)
    assert (far.num_excused, far.num_wrong) == (0, 1)
    assert near.passed
    assert not far.passed


def test_how_many_may_be_excused() -> None:
    assert TokenComparison(5000, 4995, 5).passed
    assert not TokenComparison(5000, 4994, 6).passed
    assert TokenComparison(10, 9, 1).passed
    assert not TokenComparison(10, 8, 2).passed
    assert not TokenComparison(5000, 4999, 0).passed, "one is wrong"
    # Of an engine in bfloat16, whose error is 0.6 %, ties of 6 % are near.
    assert TokenComparison(240, 230, 10, max_excused=0.06).passed
    assert not TokenComparison(240, 220, 20, max_excused=0.06).passed


def test_larger_errors_allow_more(generated: tuple[list[int], list[int], torch.Tensor]) -> None:
    prompt, tokens, _ = generated
    for error, allowed in ((1e-6, 1e-3), (6e-3, 6e-2)):
        comparison = compare_greedy([output(prompt, tokens)], build_toy("llama"), error)
        assert comparison.max_excused == pytest.approx(allowed)
