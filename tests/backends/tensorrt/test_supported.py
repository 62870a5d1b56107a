"""What TensorRT cannot take is said node by node, with the option that helps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule

from inlay.backends.tensorrt.supported import refusals

ops = torch.ops.inlay
FP8 = torch.float8_e4m3fn


def segment(target: Any, *args: Any, dtype: torch.dtype = torch.float16) -> GraphModule:
    """One call; None and texts stay as they are, the rest become placeholders of these dtypes."""
    graph = Graph()
    nodes = []
    for index, arg in enumerate(args):
        if isinstance(arg, torch.dtype):
            node = graph.placeholder(f"w{index}")
            node.meta.update(spec=((4, 4), arg), kind="weight")
            arg = node
        nodes.append(arg)
    call = graph.call_function(target, tuple(nodes))
    call.meta["val"] = torch.empty(2, dtype=dtype)
    call.meta["stack_trace"] = 'File "model.py", line 7, in forward\n    y = self.up(x)\n'
    graph.output((call,))
    return GraphModule(torch.nn.Module(), graph)


HALF, F32, I8, U8, I32 = torch.float16, torch.float32, torch.int8, torch.uint8, torch.int32
STATIC = r"quantization='w8a8,activation_scales=static,calibration=FILE"


@pytest.mark.parametrize(
    ("gm", "told"),
    [
        (segment(ops.quantize_int8.default, HALF), STATIC),
        (segment(ops.quantize_int8_asymmetric.default, HALF), STATIC),
        (segment(ops.quantize_fp8.default, HALF), "quantization='fp8,activation_scales=static"),
        (segment(ops.quantize_static.default, HALF, F32, I32, "int8"), "activation_symmetric"),
        (
            segment(ops.weight_only_linear.default, HALF, U8, F32, U8, None),
            "leave symmetric=False out",
        ),
        (
            segment(ops.fp8_linear.default, FP8, F32, FP8, F32, None, "half"),
            r"FP8 needs a target of sm89, .*, got auto \(sm80 and later\): give target='sm89'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(gm: GraphModule, told: str) -> None:
    (refusal,) = refusals(gm, "auto")
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert refusal.startswith(f"{node.name} (inlay.")
    assert refusal.endswith(', from File "model.py", line 7, in forward y = self.up(x)')
    assert re.search(told, refusal), refusal


@pytest.mark.parametrize(
    ("gm", "target"),
    [
        (segment(ops.linear.default, HALF, HALF), "auto"),
        (segment(ops.quantize_static.default, HALF, F32, None, "int8"), "auto"),
        (segment(ops.weight_only_linear.default, HALF, U8, F32, None, None), "sm80"),
        (segment(ops.fp8_linear.default, FP8, F32, FP8, F32, None, "half"), "sm89"),
        (segment(ops.fp8_linear.default, FP8, F32, FP8, F32, None, "half"), "sm120"),
    ],
)
def test_taken(gm: GraphModule, target: str) -> None:
    assert refusals(gm, target) == []


def test_fp8_on_an_older_target() -> None:
    gm = segment(ops.fp8_linear.default, FP8, F32, FP8, F32, None, "half")
    assert "got sm86: give target='sm89'" in refusals(gm, "sm86")[0]
