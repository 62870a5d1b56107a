"""Segments as ONNX: the eager segment's numbers at every size, named so that errors can be read."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from inlay.backends.eager.backend import interpret
from inlay.backends.onnx.convert import TARGETS, fill_weights, segment_to_onnx
from inlay.backends.onnx.packages import require
from inlay.errors import BuildError, UnsupportedModelError
from inlay.passes.check import relative_rms
from tests.backends.onnx.segments import random_values, segments_of, stored

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

UNLIKE = ("llama", "gemma2", "gpt2", "gpt_oss", "cohere")
"""Norms with an offset, soft-caps, layer norms, biased and interleaved experts, RoPE in turns."""
QUICK = (("gemma2", "tensorrt"), ("gpt_oss", "onnxruntime"))
SIZES = (2, 11)


def run(model: onnx.ModelProto, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """By plain ONNX Runtime."""
    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    fill_weights(filled, values.__getitem__)
    options = onnxruntime.SessionOptions()
    # Q/DQ as it stands: fused, sums saturate on CPUs without VNNI.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        filled.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {value.name: values[value.name].numpy() for value in session.get_inputs()}
    return [torch.from_numpy(one) for one in session.run(None, feed)]


def cases() -> list[Any]:
    """Most are slow: a conversion takes a second or two."""
    return [
        pytest.param(name, target, marks=() if (name, target) in QUICK else (pytest.mark.slow,))
        for name in UNLIKE
        for target in TARGETS
    ]


@pytest.mark.parametrize(("name", "target"), cases())
def test_segments_compute_what_eager_does(name: str, target: str) -> None:
    for gm in segments_of(name)[1].values():
        model = segment_to_onnx(gm, target)
        for size in SIZES:
            graph = stored(gm)
            values = random_values(graph, size)
            ours = run(model, values)
            with torch.no_grad():
                theirs = interpret(graph)(list(values.values()))
            for one, two in zip(ours, theirs, strict=True):
                assert one.shape == two.shape
                # float32 sums in another order; seen are up to 4e-7.
                assert relative_rms(two, one) <= 5e-6


def test_names_lead_back_to_the_graph() -> None:
    program, segments = segments_of("llama")
    gm = segments[program.segment_keys[1]]
    model = segment_to_onnx(gm, "tensorrt")
    placeholders = stored(gm).graph.find_nodes(op="placeholder")
    weights = [n.name for n in placeholders if n.meta["kind"] == "weight"]
    inputs = [n.name for n in placeholders if n.meta["kind"] == "input"]
    assert [tensor.name for tensor in model.graph.initializer if tensor.external_data] == weights
    assert [value.name for value in model.graph.input] == inputs
    assert [value.name for value in model.graph.output] == ["o0", "o1", "o2", "o3"]
    sizes = [
        dim.dim_param
        for value in (*model.graph.input, *model.graph.output)
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    ]
    assert set(sizes) == {"T"}
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    assert [node.name.partition(".")[0] for node in norms] == [
        "add_rms_norm_default",
        "add_rms_norm_default_1",
    ]
    assert "inlay.add_rms_norm.default" in norms[0].doc_string
    assert "modeling_llama.py" in norms[0].doc_string
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph.node) == 2


def segment_with(
    target: object, *others: object, dtype: torch.dtype = torch.float32
) -> GraphModule:
    """x [T, 8] through one op."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta |= {"spec": (("T", 8), dtype), "kind": "input"}
    y = graph.call_function(target, (x, *others))  # type: ignore[arg-type]
    y.meta["stack_trace"] = 'File "modeling_toy.py", line 7, in forward\n  y = self.odd(x)'
    graph.output((graph.call_function(torch.ops.aten.relu.default, (y,)),))
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [0.7, 2049, 0.5, 2])
@pytest.mark.parametrize("name", ["mul", "div", "sub", "add"])
def test_numbers_are_exact(name: str, number: float, dtype: torch.dtype) -> None:
    """Where 0.7, which has no place in either type, is rounded first, x * 0.7 is another number."""
    target = getattr(torch.ops.aten, name).Tensor
    model = segment_to_onnx(segment_with(target, number, dtype=dtype), "tensorrt")
    casts = sum(node.op_type == "Cast" for node in model.graph.node)
    assert casts == (2 if number in (0.7, 2049) else 0)
    if dtype == torch.float16:  # ONNX Runtime has no bfloat16 arithmetic on a CPU
        x = torch.randn(64, 8).half()
        exact = target(x.float(), number).half().relu()
        assert torch.equal(run(model, {"x": x})[0], exact)


def test_a_tensor_without_dimensions_is_exact_too() -> None:
    """torch takes it for a number: it has no say in the type of the product."""
    gm = segment_with(torch.ops.aten.relu.default, dtype=torch.float16)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(x):
        scale = gm.graph.placeholder("w")
    scale.meta |= {"spec": ((), torch.float32), "kind": "weight"}
    relu = next(iter(x.users))
    with gm.graph.inserting_before(relu):
        product = gm.graph.call_function(torch.ops.aten.mul.Tensor, (x, scale))
    relu.args = (product,)
    values = {"x": torch.randn(64, 8).half(), "w": torch.tensor(0.7)}
    (found,) = run(segment_to_onnx(gm, "tensorrt"), values)
    assert torch.equal(found, (values["x"] * values["w"]).relu())


def test_what_cannot_be_converted_is_named() -> None:
    gm = segment_with(torch.ops.aten.special_bessel_j0.default)
    with pytest.raises(UnsupportedModelError) as caught:
        segment_to_onnx(gm, "onnxruntime")
    message = str(caught.value)
    assert "node special_bessel_j0_default (aten.special_bessel_j0.default)" in message
    assert 'File "modeling_toy.py", line 7' in message
    assert "backend='inductor'" in message


def test_what_cannot_be_exported_is_named() -> None:
    gm = segment_with(torch.ops.aten.reshape.default, [3, 5])
    with pytest.raises(UnsupportedModelError, match=r"node reshape_default.*modeling_toy\.py"):
        segment_to_onnx(gm, "tensorrt")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name, name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BuildError, match=r"package 'onnx'.*pip install 'inlay\[onnxruntime\]'"):
        require("onnx", extra="onnxruntime")
