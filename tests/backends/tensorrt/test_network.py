"""From ONNX to a plan through full TensorRT's names, and what a builder's log says of an engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnx import TensorProto, helper

from inlay.backends.base import ModelLimits
from inlay.backends.tensorrt.engines import num_bytes, profiles
from inlay.backends.tensorrt.network import build_plan, told_of
from tests.backends.tensorrt.fake_library import fake_library

LOG = """Layers:
Name: shapes, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], Metadata:
Name: __myl_FcSilu, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [-1], Datatype: \
BFloat16, Format: (Linear) }, { Name: s, Datatype: Float }], Constants: [ { Name: w, Datatype: \
Int8, Format: (Transposed) }], Outputs: [ { Name: y, Datatype: BFloat16 }], TacticName: , StreamId:\
 0, Metadata: [ONNX Layer: up.MatMul.3][ONNX Layer: silu.Sigmoid.4]

I/O Tensors:
 Name: x, IOMode: Input, DataType: BFloat16"""


def test_what_a_log_says_of_an_engine() -> None:
    lines = ["Total Activation Memory: 512 bytes", "Total Activation Memory: 2048 bytes", LOG]
    (shapes, product), activation_bytes = told_of(lines)
    assert activation_bytes == 2048
    assert shapes["type"] == "shape_call"
    assert product == {
        "name": "__myl_FcSilu",
        "type": "runtime_fusion",
        "nodes": ["up.MatMul.3", "silu.Sigmoid.4"],
        "inputs": ["BFloat16", "Float"],
        "constants": ["Int8"],
    }


@pytest.mark.parametrize(("target", "expected"), [("auto", "ampere plus"), ("sm89", None)])
def test_a_plan_of_full_tensorrt(target: str, expected: str | None) -> None:
    shapes = {"i0": ((2, 8), (4, 8), (16, 8))}
    weights = {"w0": np.zeros(4, dtype=np.uint8)}
    plan = build_plan(fake_library(), b"model", weights, [shapes, shapes], target)
    made = json.loads(plan.data)
    assert made["compatibility"] == expected
    assert made["profiles"] == [{"i0": [16, 8]}] * 2
    assert plan.num_nodes == 3


def test_profiles_hold_all_that_limits_allow() -> None:
    """Least, usual and largest sizes; a size that is a number stays."""
    value = helper.make_tensor_value_info("i0", TensorProto.FLOAT16, [1, "T", 48])
    rows = helper.make_tensor_value_info("i1", TensorProto.INT64, ["R"])
    graph = helper.make_graph([], "g", [value, rows], [])
    limits = ModelLimits(128, 256, 100, 1, 16)
    decode, prefill = profiles(helper.make_model(graph), limits)
    assert decode == {"i0": ((1, 2, 48),) * 3, "i1": ((2,),) * 3}  # steps have two rows at least
    assert prefill["i0"] == ((1, 2, 48), (1, 100, 48), (1, 100, 48))
    assert prefill["i1"] == ((2,), (100,), (100,))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TensorProto.FLOAT, 60),
        (TensorProto.BFLOAT16, 30),
        (TensorProto.FLOAT8E4M3FN, 15),
        (TensorProto.INT8, 15),
        (TensorProto.INT4, 8),
    ],
)
def test_bytes_of_an_initializer(kind: int, expected: int) -> None:
    assert num_bytes(TensorProto(dims=[3, 5], data_type=kind)) == expected
