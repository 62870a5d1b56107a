"""Mixtures of experts as ONNX functions, in every layout and with every activation."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch.fx import Graph, GraphModule

from inlay.backends.eager.backend import interpret
from inlay.backends.onnx.convert import segment_to_onnx
from inlay.errors import UnsupportedModelError
from inlay.passes.check import relative_rms
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from tests.backends.onnx.test_convert import run

ops = torch.ops.inlay
EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 32, 48

PLAIN: list[dict[str, Any]] = [
    {},
    {"gated": False, "activation": "relu2"},
    {"transposed": True, "activation": "gelu_tanh", "norm": True, "norm_eps": 1e-5},
    {
        "biased": True,
        "interleaved": True,
        "alpha": 1.702,
        "gate_limit": 0.7,
        "up_limit": 0.7,
        "up_offset": 1.0,
    },
    {"gate_softcap": 2.0, "up_softcap": 2.0, "gate_limit": 0.5, "limit_activated": True},
]
QUANTIZED = [
    Scheme("int8", "int8"),
    Scheme("int4", group_size=16),
    Scheme("int4", group_size=16, symmetric=False),
    Scheme("int8", symmetric=False),
    Scheme("fp8", "fp8"),
]


def layer(
    options: dict[str, Any], scheme: Scheme | None = None
) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """One call of either op, and values for its placeholders: the last slots are no experts."""
    options = dict(options)
    graph, values = Graph(), {}

    def place(name: str, value: torch.Tensor, kind: str = "weight") -> Any:
        node = graph.placeholder(name)
        shape = value.shape if kind == "weight" else ("T", *value.shape[1:])
        node.meta |= {"spec": (tuple(shape), value.dtype), "kind": kind}
        values[name] = value
        return node

    columns = 2 * INNER if options.get("gated", True) else INNER
    given: dict[str, Any] = {}
    for name, shape in (("up", (columns, HIDDEN)), ("down", (HIDDEN, INNER))):
        weight = torch.randn(EXPERTS, *shape) * 0.3
        if scheme is not None:
            parts = zip(("", "_scale", "_zero"), quantize_weight(weight, scheme), strict=True)
            made = {name + part: value for part, value in parts}
            given |= {n: None if v is None else place(n, v) for n, v in made.items()}
        else:
            turned = weight.mT.contiguous() if options.get("transposed") else weight
            given[name] = place(name, turned)
    if options.pop("biased", False):
        given["up_bias"] = place("up_bias", torch.randn(EXPERTS, columns))
        given["down_bias"] = place("down_bias", torch.randn(EXPERTS, HIDDEN))
    if options.pop("norm", False):
        given["norm_weight"] = place("norm_weight", torch.randn(HIDDEN))
    index = torch.randint(0, EXPERTS - 1, (9, TOP_K))
    index[-2:, 1] = torch.tensor([EXPERTS, -1])
    given["x"] = place("x", torch.randn(9, HIDDEN), "input")
    given["top_k_index"] = place("index", index, "input")
    given["top_k_weights"] = place("weights", torch.rand(9, TOP_K), "input")
    if scheme is not None:
        given["activations"] = scheme.activation
    op = ops.experts if scheme is None else ops.quantized_experts
    graph.output((graph.call_function(op.default, (), {**given, **options}),))
    return GraphModule(torch.nn.Module(), graph), values


def error(gm: GraphModule, values: dict[str, torch.Tensor], target: str) -> float:
    with torch.no_grad():
        (expected,) = interpret(gm)(list(values.values()))
    return relative_rms(expected, run(segment_to_onnx(gm, target), values)[0])


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("options", PLAIN)
def test_experts(options: dict[str, Any], target: str) -> None:
    # float32, summed in another order.
    assert error(*layer(options), target) <= 1e-6


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_quantized_experts(scheme: Scheme) -> None:
    # Where an activation's float32 differs in its last bit, its rounding to 8 bits may differ.
    tolerance = 1e-6 if scheme.activation == "none" else 1e-3
    assert error(*layer({"biased": True, "interleaved": True}, scheme), "onnxruntime") <= tolerance


@pytest.mark.parametrize("options", [{}, {"biased": True, "interleaved": True}])
@pytest.mark.parametrize(
    "scheme",
    [Scheme("int8"), Scheme("int8", group_size=16), Scheme("int4", group_size=16), Scheme("int4")],
)
def test_quantized_experts_for_tensorrt(options: dict[str, Any], scheme: Scheme) -> None:
    """Q/DQ of all experts' weights at once, which keeps them narrow."""
    gm, values = layer(options, scheme)
    assert error(gm, values, "tensorrt") <= 1e-6
    model = segment_to_onnx(gm, "tensorrt")
    stored = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert stored["up"] == stored["down"] == scheme.weight.upper()


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        (Scheme("int8", "int8"), r"ignore=\*experts\*"),
        (Scheme("fp8", "fp8"), r"ignore=\*experts\*"),
        (Scheme("int4", group_size=16, symmetric=False), "without zero points"),
    ],
)
def test_experts_that_tensorrt_cannot_take(scheme: Scheme, told: str) -> None:
    gm, _ = layer({}, scheme)
    with pytest.raises(UnsupportedModelError, match=rf"node quantized_experts.*{told}"):
        segment_to_onnx(gm, "tensorrt")
