"""Narrow floats read as float32, in a segment's graph and in its ONNX alike. Neither rounds between
nodes then, so that the two must agree closely; and on a CPU ONNX Runtime has no bfloat16 products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

if TYPE_CHECKING:
    import onnx

FLOAT, NARROW = 1, (10, 16)
"""ONNX's numbers of element types: float32; float16 and bfloat16."""
DTYPES = (torch.float16, torch.bfloat16)
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in DTYPES else tensor


def widen_graph(gm: GraphModule) -> None:
    def widen(argument: Any) -> Any:
        return torch.float32 if argument in DTYPES else argument

    for node in gm.graph.nodes:
        node.args = map_aggregate(node.args, widen)
        node.kwargs = map_aggregate(node.kwargs, widen)
    gm.recompile()


def widen_model(model: onnx.ModelProto) -> None:
    """Weights with data from elsewhere must then be given wide."""
    from onnx import TensorProto

    graph = model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            _widen_tensor(tensor)
        elif tensor.data_type in NARROW:
            tensor.data_type = FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.i in NARROW:
                attribute.i = FLOAT
            elif attribute.HasField("t"):
                _widen_tensor(attribute.t)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    from onnx import numpy_helper

    if tensor.data_type in NARROW:
        numbers = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
