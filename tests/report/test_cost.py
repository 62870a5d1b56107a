"""Operations and bytes of toys, computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from inlay.backends.program import AttentionStep
from inlay.report.cost import Machine, StepCost, Workload, _attention_flops, _kv_values, workloads
from inlay.report.facts import Report
from tests.report.conftest import mixtral, report_of
from tests.toys import build_toy

CALL = AttentionStep(
    layer=0, group=0, cache=0, query="q", key="k", value="v", output="o", num_heads=4,
    num_kv_heads=2, head_dim=16, v_head_dim=24, scale=1.0,
)  # fmt: skip


def test_llama_by_hand(llama: Report) -> None:
    """hidden 64, 4 query and 2 KV heads of 16, MLP 112, vocabulary 128, 2 layers, 256 positions."""
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 112
    head = 64 * 128
    norms, inv_freq = (2 * 2 + 1) * 64, 8
    one, batch, prefill = llama.costs
    assert one.workload == Workload("decode, batch 1", 1, 1, 256)
    assert one.product_flops == 2 * (2 * layer + head)
    assert batch.product_flops == 32 * one.product_flops
    # Prefill asks for one row of logits.
    assert prefill.workload == Workload("prefill, 256 tokens", 1, 256, 256)
    assert prefill.product_flops == 2 * (256 * 2 * layer + head)
    # Per pair and head 16 multiply-adds for the score and 16 for the value.
    pairs = 256 * 257 // 2
    assert one.attention_flops == 2 * 256 * 4 * (16 + 16) * 2
    assert prefill.attention_flops == 2 * pairs * 4 * (16 + 16) * 2
    constant = 4 * (2 * layer + head + norms + inv_freq)
    assert [c.weight_bytes for c in llama.costs] == [
        constant + 4 * rows * 64 for rows in (1, 32, 128)
    ]
    kv = 2 * 256 * 2 * (16 + 16) * 4
    assert [c.kv_bytes for c in llama.costs] == [kv, 32 * kv, kv]
    assert llama.weight_bytes == constant + 4 * 128 * 64


def test_tied_embeddings_are_read_once_and_whole(llama: Report, tmp_path: Path) -> None:
    tied = report_of(build_toy("llama", tie_word_embeddings=True), tmp_path / "tied")
    rows = 4 * 64
    assert tied.costs[0].weight_bytes == llama.costs[0].weight_bytes - rows
    assert tied.weight_bytes == llama.weight_bytes - 4 * 128 * 64
    assert tied.costs[0].product_flops == llama.costs[0].product_flops


def test_windows_of_some_layers(tmp_path: Path) -> None:
    report = report_of(build_toy("gemma2"), tmp_path / "gemma2")
    near, far = report.attentions
    assert (near.layers, near.step.window, near.step.softcap) == ((0, 2), 8, 50.0)
    assert (far.layers, far.step.window) == ((1,), 0)
    per_token = 2 * (24 + 24) * 4
    assert report.costs[0].kv_bytes == (8 + 256 + 8) * per_token
    assert report.costs[0].attention_flops == 2 * 4 * (24 + 24) * (8 + 256 + 8)
    assert report.costs[2].kv_bytes == 3 * 256 * per_token


def test_experts_are_counted_as_they_are_met(tmp_path: Path) -> None:
    report = report_of(mixtral(), tmp_path / "mixtral")
    attention = 64 * (64 + 32 + 32) + 64 * 64
    router, expert, head = 64 * 4, 3 * 64 * 48, 64 * 128
    one, batch, _ = report.costs
    assert one.product_flops == 2 * (attention + router + 2 * expert + head)
    assert batch.product_flops == 32 * one.product_flops
    rest = attention + router + head + 3 * 64 + 8
    assert one.weight_bytes == 4 * (rest + 64 + 2 * expert)
    # 32 tokens choosing 2 of 4 evenly leave out an expert once in 2 ** 32.
    assert batch.weight_bytes == 4 * (rest + 32 * 64 + 4 * expert)


@pytest.mark.parametrize(
    ("changes", "pairs", "keys"),
    [
        ({}, 8 + 9 + 10, 10),
        ({"window": 4}, 3 * 4, 6),
        ({"window": 9}, 8 + 9 + 9, 10),
        ({"chunk": 4}, 4 + 1 + 2, 6),  # positions 7, 8, 9: chunks 4-7 and 8-11
        ({"causal": False}, 3 * 10, 10),
        ({"causal": False, "window": 3}, 5 + 4 + 3, 5),
    ],
)
def test_keys_that_new_tokens_see(changes: dict[str, int], pairs: int, keys: int) -> None:
    step, load = replace(CALL, **changes), Workload("", 5, 3, 10)
    assert _attention_flops(step, load) == 5 * pairs * 2 * 4 * (16 + 24)
    assert _kv_values(step, load) == 5 * keys * 2 * (16 + 24)


def test_roofline() -> None:
    machine = Machine(bandwidth=100.0, flops=1000.0)
    assert machine.ridge == 10
    low = StepCost(Workload("", 2, 1, 8), 300, 100, 150, 50)
    assert low.intensity == 2
    assert low.is_memory_bound(machine)
    assert low.tokens_per_second(machine) == 2 / 2.0  # 200 bytes take 2 s
    high = StepCost(Workload("", 1, 40, 40), 7000, 1000, 150, 50)
    assert not high.is_memory_bound(machine)
    assert high.tokens_per_second(machine) == 40 / 8.0


def test_workloads_fit_the_model() -> None:
    assert [w.context for w in workloads(100_000)] == [1024, 1024, 512]
    assert [w.num_new_tokens for w in workloads(96)] == [1, 1, 96]
    assert [w.name for w in workloads(96, is_encoder=True)] == ["text, 96 tokens"]
