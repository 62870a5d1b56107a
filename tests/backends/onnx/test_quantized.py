"""Quantized layers as ONNX: what the references compute, by ONNX Runtime; Q/DQ for TensorRT."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from inlay.backends.eager.backend import interpret
from inlay.backends.onnx.convert import segment_to_onnx
from inlay.errors import UnsupportedModelError
from inlay.passes.check import relative_rms
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from tests.backends.onnx.test_convert import run

ops = torch.ops.inlay
IN, OUT = 96, 48  # 96: no power of two


class Layer:
    """A graph of one layer, and its weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.graph, self.dtype = Graph(), dtype
        self.values: dict[str, torch.Tensor] = {}

    def weight(self, value: torch.Tensor | None) -> Node | None:
        if value is None:
            return None
        node = self.graph.placeholder(f"w{len(self.values)}")
        node.meta |= {"spec": (tuple(value.shape), value.dtype), "kind": "weight"}
        self.values[node.name] = value
        return node

    def input(self) -> Node:
        node = self.graph.placeholder("x")
        node.meta |= {"spec": ((1, "T", IN), self.dtype), "kind": "input"}
        return node

    def finish(self, output: Node) -> GraphModule:
        self.graph.output((output,))
        return GraphModule(torch.nn.Module(), self.graph)


def quantized(layer: Layer, **scheme: Any) -> list[Node | None]:
    """Values, scales and zeros of a random weight."""
    return [layer.weight(part) for part in quantize_weight(torch.randn(OUT, IN), Scheme(**scheme))]


def weight_only(layer: Layer, **scheme: Any) -> Node:
    parts = quantized(layer, **scheme)
    bias = layer.weight(torch.randn(OUT).to(layer.dtype))
    call = layer.graph.call_function
    return call(ops.weight_only_linear.default, (layer.input(), *parts, bias))


def float8_weight(layer: Layer) -> Node:
    return weight_only(layer, weight="fp8")


def dynamic(layer: Layer, quantizer: Any, num_outputs: int) -> Node:
    values, scales, _ = quantized(layer, weight="int8")
    bias = layer.weight(torch.randn(OUT).to(layer.dtype))
    call = layer.graph.call_function
    made = call(quantizer, (layer.input(),))
    q, *given = [call(operator.getitem, (made, index)) for index in range(num_outputs)]
    given = [*given, None][:2]
    return call(ops.int8_linear.default, (q, *given, values, scales, bias, layer.dtype))


def symmetric(layer: Layer) -> Node:
    return dynamic(layer, ops.quantize_int8.default, 2)


def asymmetric(layer: Layer) -> Node:
    return dynamic(layer, ops.quantize_int8_asymmetric.default, 3)


def static(layer: Layer, dtype: str = "int8", zero: torch.Tensor | None = None) -> Node:
    values, scales, _ = quantized(layer, weight=dtype)
    # Many numbers do not fit: ONNX's int8 would have -128 for some, ours has -127.
    scale = layer.weight(torch.tensor([1 / 127 if dtype == "int8" else 1 / 448]))
    zeros = layer.weight(zero)
    call = layer.graph.call_function
    q = call(ops.quantize_static.default, (layer.input(), scale, zeros, dtype))
    if dtype == "fp8":
        return call(ops.fp8_linear.default, (q, scale, values, scales, None, layer.dtype))
    arguments = (q, scale, zeros, values, scales, None, layer.dtype)
    return call(ops.int8_linear.default, arguments)


def with_zero(layer: Layer) -> Node:
    return static(layer, zero=torch.tensor([-7], dtype=torch.int32))


def dynamic_float8(layer: Layer) -> Node:
    values, scales, _ = quantized(layer, weight="fp8")
    call = layer.graph.call_function
    made = call(ops.quantize_fp8.default, (layer.input(),))
    q, scale = (call(operator.getitem, (made, index)) for index in range(2))
    return call(ops.fp8_linear.default, (q, scale, values, scales, None, layer.dtype))


def int4(layer: Layer) -> Node:
    return weight_only(layer, weight="int4", group_size=32)


def int4_with_zeros(layer: Layer) -> Node:
    return weight_only(layer, weight="int4", group_size=32, symmetric=False)


def int8_rows(layer: Layer) -> Node:
    return weight_only(layer, weight="int8")


def int8_with_zeros(layer: Layer) -> Node:
    return weight_only(layer, weight="int8", group_size=32, symmetric=False)


EXACT = (symmetric, asymmetric, static, with_zero)
"""Sums in int32, then the reference's own float32 steps."""

ROUNDED = (int4, int4_with_zeros, int8_rows, int8_with_zeros, float8_weight, dynamic_float8)
"""float32 sums in another order."""


def outputs(
    gm: GraphModule, layer: Layer, model: onnx.ModelProto
) -> tuple[torch.Tensor, torch.Tensor]:
    values = {**layer.values, "x": torch.randn(1, 7, IN).to(layer.dtype)}
    with torch.no_grad():
        expected = interpret(gm)([values[n.name] for n in gm.graph.find_nodes(op="placeholder")])
    return run(model, values)[0], expected[0]


@pytest.mark.parametrize("make", [*EXACT, *ROUNDED])
def test_onnx_runtime_computes_the_reference(make: Callable[[Layer], Node]) -> None:
    layer = Layer()
    gm = layer.finish(make(layer))
    ours, expected = outputs(gm, layer, segment_to_onnx(gm, "onnxruntime"))
    assert relative_rms(expected, ours) <= (1e-7 if make in EXACT else 1e-6)


@pytest.mark.parametrize("make", [static, int4, int8_rows])
def test_q_dq_computes_it_too(make: Callable[[Layer], Node]) -> None:
    layer = Layer()
    gm = layer.finish(make(layer))
    model = segment_to_onnx(gm, "tensorrt")
    kinds = {node.op_type for node in model.graph.node}
    assert "DequantizeLinear" in kinds
    assert {node.domain for node in model.graph.node} == {""}
    stored = next(t.data_type for t in model.graph.initializer if t.name == "w0")
    wanted = onnx.TensorProto.INT4 if make is int4 else onnx.TensorProto.INT8
    assert stored == wanted, "weights stay narrow"
    ours, expected = outputs(gm, layer, model)
    assert relative_rms(expected, ours) <= 1e-6


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (symmetric, "w8a8,activation_scales=static,calibration=FILE"),
        (dynamic_float8, "fp8,activation_scales=static,calibration=FILE"),
        (with_zero, "activation_symmetric"),
        (int4_with_zeros, "symmetric=true"),
    ],
)
def test_what_tensorrt_lacks_is_said(make: Callable[[Layer], Node], reason: str) -> None:
    layer = Layer()
    gm = layer.finish(make(layer))
    with pytest.raises(UnsupportedModelError, match=rf"node \w+ \(inlay\.\w+.*{reason}"):
        segment_to_onnx(gm, "tensorrt")
