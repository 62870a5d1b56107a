"""Bytes and operations of programs: as `inlay inspect` counts them; of quantized ops by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from inlay import CompileOptions, Engine
from inlay.backends.graph_json import graph_from_json
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.bench.metrics import Record
from inlay.bench.program_cost import Product, ProgramCost
from inlay.bench.roofline import (
    decode_bytes,
    decode_share,
    load_shares,
    prefill_share,
    shape_rate,
)
from inlay.engine import build
from inlay.report.cost import Workload, step_cost
from tests.toys import build_toy

CONTEXT = 20
EAGER = CompileOptions(backend="eager", dtype="float32", verify="capture")


@pytest.fixture(scope="module", params=["qwen3_moe", "gemma2", "gpt2", "qwen3_moe w8a8"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Experts; windows and soft-caps; biases and other norms; quantized experts."""
    name, _, quantization = request.param.partition(" ")
    target = tmp_path_factory.mktemp("cost") / "engine"
    options = replace(EAGER, quantization=quantization or "none")
    return build(build_toy(name, layers=1), target, options)


def test_costs_are_those_of_the_report(engine: Engine) -> None:
    artifact = engine.artifact
    names = artifact.program.segment_keys
    graphs = {n: graph_from_json(artifact.json(f"segments/{n}/graph.json")) for n in names}
    index, cost = artifact.json("weights/index.json"), ProgramCost(engine)
    for workload in (
        Workload("decode", 1, 1, CONTEXT),
        Workload("batch", 8, 1, CONTEXT),
        Workload("prefill", 1, CONTEXT, CONTEXT),
    ):
        found = step_cost(artifact.program, graphs, workload, lambda name: index[name]["tensor"])
        contexts = range(CONTEXT - workload.num_new_tokens + 1, CONTEXT + 1)
        tokens, requests = workload.num_tokens, workload.num_requests
        assert cost.product_flops(tokens, requests) == pytest.approx(found.product_flops)
        assert requests * cost.attention_flops(contexts) == found.attention_flops
        # The report also counts the rows of the tables that are looked up in: token, and position.
        rows = tokens * 64 * 4
        assert 0 <= found.weight_bytes - cost.weight_bytes(tokens) <= 2 * rows + 1
        if workload.num_new_tokens == 1:
            assert requests * cost.kv_bytes(CONTEXT) == found.kv_bytes


def test_the_cache_counts_as_it_is_stored(engine: Engine) -> None:
    plain = ProgramCost(engine).kv_bytes(CONTEXT)
    assert ProgramCost(engine, "bfloat16").kv_bytes(CONTEXT) == plain / 2
    assert ProgramCost(engine, "fp8").kv_bytes(CONTEXT) == plain / 4
    scales = sum(2 * 4 * s.num_kv_heads * min(CONTEXT, s.window or CONTEXT)
                 for s in engine.artifact.program.attention_steps)  # fmt: skip
    assert ProgramCost(engine, "int8").kv_bytes(CONTEXT) == plain / 4 + scales
    weights = ProgramCost(engine).weight_bytes()
    assert decode_bytes(engine, CONTEXT) == round(weights + plain)


@pytest.mark.parametrize("quantization", ["w8a8", "w4a16,group_size=32,embeddings=int8"])
def test_a_quantized_engine_reads_what_it_has_stored(quantization: str, tmp_path: Path) -> None:
    model = build_toy("llama", layers=1, tie_word_embeddings=False, intermediate_size=128)
    options = CompileOptions(backend="eager", quantization=quantization, verify="capture")
    engine = build(model, tmp_path / "engine", options)
    stored = sum(
        tensor.nbytes
        for file in (engine.path / "weights").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "embed" not in name
    )
    cost = ProgramCost(engine)
    assert cost.weight_bytes() == stored
    kinds = {product.dtype for product in cost.products if not product.per_logit}
    assert kinds == {"int8" if quantization == "w8a8" else "float32"}
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    head, _ = matrices.pop("lm_head.weight"), matrices.pop("model.embed_tokens.weight")
    assert cost.product_flops(5, 3) == 2 * (5 * sum(matrices.values()) + 3 * head)


class QuantizedEngine:
    """An engine whose only content is graphs: one weight of each kind, tied at both ends."""

    def __init__(self) -> None:
        weights = ("table", "table_scale", "int8", "s", "packed", "s4", "zero", "fp8", "s8", "up",
                   "up_scale", "down", "down_scale")  # fmt: skip
        segment = SegmentStep("body", weights, ("input_ids",), ("hidden",))
        head = SegmentStep("head", ("lm_head", "lm_head_scale"), ("hidden",), ("logits",))
        attention = AttentionStep(0, 0, 0, "q", "k", "v", "o", 4, 2, 8, 8, 1.0)
        self.program = Program((segment, attention, head), "hidden", "logits", "bfloat16", 50)
        self.artifact = self
        index = {name: {"tensor": name} for name in weights}
        index |= {"lm_head": {"tensor": "table"}, "lm_head_scale": {"tensor": "table_scale"}}
        self._files = {
            "weights/index.json": index,
            "segments/body/graph.json": {"nodes": self._body()},
            "segments/head/graph.json": {
                "nodes": [
                    weight([50, 16], "int8"), weight([50], "float32"), {"op": "input"},
                    call("inlay.quantize_int8", ref(2)),
                    call("inlay.int8_linear", ref(3), ref(3), None, ref(0), ref(1), None, BF16),
                ]
            },
        }  # fmt: skip

    def json(self, name: str) -> Any:
        return self._files[name]

    @staticmethod
    def _body() -> list[dict[str, Any]]:
        return [
            weight([50, 16], "int8"), weight([50], "float32"),
            weight([24, 16], "int8"), weight([24], "float32"),
            weight([16, 12], "uint8"), weight([3, 16], "bfloat16"), weight([3, 16], "uint8"),
            weight([8, 16], "float8_e4m3fn"), weight([1, 8], "float32"),
            weight([4, 10, 8], "int8"), weight([4, 1, 10], "float32"),
            weight([4, 8, 5], "int8"), weight([4, 1, 8], "float32"),
            {"op": "input", "shape": [1, "T"], "dtype": "int64"},
            call("inlay.quantized_embedding", ref(13), ref(0), ref(1), BF16),
            call("inlay.int8_linear", ref(14), ref(14), None, ref(2), ref(3), None, BF16),
            call("inlay.weight_only_linear", ref(15), ref(4), ref(5), ref(6), None),
            call("inlay.fp8_linear", ref(16), ref(16), ref(7), ref(8), None, BF16),
            call("aten.topk", ref(17), 2, -1),
            call("operator.getitem", ref(18), 1),
            call("inlay.quantized_experts", ref(17), ref(19), ref(18), ref(9), ref(10), None,
                 ref(11), ref(12), None, "int8", "silu"),
        ]  # fmt: skip


BF16 = {"torch": "bfloat16"}


def weight(shape: list[int], dtype: str) -> dict[str, Any]:
    return {"op": "weight", "shape": shape, "dtype": dtype}


def ref(number: int) -> dict[str, int]:
    return {"node": number}


def call(name: str, *args: Any) -> dict[str, Any]:
    return {"op": f"{name}.default", "args": list(args), "kwargs": {}}


def test_quantized_weights_count_as_they_are_stored() -> None:
    cost = ProgramCost(QuantizedEngine())
    dense = 24 * 16 + 24 * 4 + 16 * 12 + 3 * 16 * 2 + 3 * 16 + 8 * 16 + 8 * 4
    tied = 50 * 16 + 50 * 4  # looked up in below, and read as the LM head
    experts = 4 * (10 * 8 + 10 * 4 + 8 * 5 + 8 * 4)
    assert cost.weight_bytes(1) == pytest.approx(dense + tied + experts * 2 / 4)
    assert cost.weight_bytes(2) == pytest.approx(dense + tied + experts * (1 - (2 / 4) ** 2))
    assert cost.products == [
        Product(24, 16, "int8"),
        Product(16, 24, "bfloat16"),
        Product(8, 16, "bfloat16"),
        Product(10, 8, "int8", 2),
        Product(8, 5, "int8", 2),
        Product(50, 16, "int8", per_logit=True),
    ]
    body = 2 * (24 * 16 + 16 * 24 + 8 * 16 + 2 * (10 * 8 + 8 * 5))
    assert cost.product_flops(7, 3) == 7 * body + 3 * 2 * 50 * 16


def test_shares() -> None:
    cost = ProgramCost(QuantizedEngine())
    kv = 2 * (8 + 8) * 2  # heads, sizes, bytes of bfloat16: a position
    assert cost.kv_bytes([3, 5]) == 8 * kv
    step = cost.weight_bytes(2) + 8 * kv
    assert decode_share(cost, [3, 5], step / 100, 200) == pytest.approx(0.5)
    attention = 2 * 4 * (8 + 8)  # of a pair
    prompts = cost.product_flops(5, 2) + (1 + 2 + 1 + 2 + 3) * attention
    assert prefill_share(cost, [2, 3], 2.0, prompts) == pytest.approx(0.5)
    # 3 prompt tokens of which 1 was cached and 3 output tokens, the last of which is not run:
    # 4 tokens run, in 4 steps, that see 2, 3 | 4, 5 positions.
    records = [Record(3, 3, 0.0, 0.0, 1.0, 2.0, 1), Record(9, 0, 0.0, 0.0, reason="refused")]
    found = load_shares(cost, records, 4, 10.0, 1000.0, 500.0)
    num_bytes = 4 * cost.weight_bytes(1) + (3 + 4 + 5) * kv
    flops = cost.product_flops(4, 3) + (2 + 3 + 4 + 5) * attention
    assert found["memory_share"] == pytest.approx(num_bytes / 10 / 1000)
    assert found["compute_share"] == pytest.approx(flops / 10 / 500)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_rate_of_a_models_products(dtype: str) -> None:
    products = [Product(64, 32, dtype), Product(64, 32, dtype), Product(1 << 30, 64, dtype,
                per_logit=True)]  # fmt: skip
    # Less than a petaflop, more than a megaflop: the LM head was not tried, and units are right.
    assert 1e6 < shape_rate(products, 16, 1) < 1e15
