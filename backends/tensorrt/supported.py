"""What TensorRT cannot take, said before anything is built: a sentence for each node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.backends.base import Known
from inlay.backends.tensorrt.library import AUTO, TARGETS
from inlay.passes.graph import bind, is_call, last_source_line
from inlay.passes.quantize.config import NONE, Scheme

ops = torch.ops.inlay

FP8_TARGETS = ("sm89", "sm120", "sm121")
"""Targets whose tensor cores multiply FP8."""

STATIC = "activation_scales=static,calibration=FILE"
FORMATS = {"int8": "w8a8", "fp8": "fp8"}
"""What activations are rounded to -> the format that does so."""

NO_ACTIVATION_ZEROS = (
    "TensorRT takes activations without zero points; build with "
    f"quantization='w8a8,{STATIC}' and leave activation_symmetric=False out"
)
NO_WEIGHT_ZEROS = "TensorRT takes weights without zero points; leave symmetric=False out"
WAYS_OUT = (
    "fallback='inductor' lets Inductor run such segments; backend='inductor' runs all of them"
)


def scheme_refusal(scheme: Scheme, known: Known) -> str:
    """Why layers of this scheme cannot be taken, as `refusals` says it of their nodes; or ""."""
    if scheme.activation != NONE and not scheme.static:
        return _dynamic(FORMATS[scheme.activation], known.is_stored)
    if scheme.activation != NONE and not scheme.activation_symmetric:
        return NO_ACTIVATION_ZEROS
    if not scheme.symmetric:
        return NO_WEIGHT_ZEROS
    return _fp8(known.target) if scheme.weight == "fp8" else ""


def refusals(gm: GraphModule, target: str) -> list[str]:
    """The nodes of a segment that no engine for this target can hold, each with the reason, the
    remedy and the model's source line where that is known."""
    found = []
    for node in gm.graph.nodes:
        reason = _reason(node, target)
        if reason:
            found.append(f"{node.name} ({node.target}): {reason}{last_source_line(node)}")
    return found


def _reason(node: Node, target: str) -> str:
    if node.op == "call_function":
        for targets, judge in _RULES:
            if is_call(node, *targets) and (reason := judge(bind(node))):
                return reason
    return _fp8(target) if node.op == "call_function" and _is_fp8(node) else ""


def _fp8(target: str) -> str:
    if target in FP8_TARGETS:
        return ""
    what = f"got {target} ({TARGETS[target]})" if target == AUTO else f"got {target}"
    return f"FP8 needs a target of {', '.join(FP8_TARGETS)}, {what}: give target='sm89'"


def _is_fp8(node: Node) -> bool:
    return any(
        dtype == torch.float8_e4m3fn
        for one in (node, *node.all_input_nodes)
        for dtype in _types(one)
    )


def _types(node: Node) -> list[Any]:
    if "spec" in node.meta:
        return [node.meta["spec"][1]]
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [one.dtype for one in values if isinstance(one, torch.Tensor)]


def _dynamic(format_: str, is_stored: bool = False) -> str:
    remedy = f"build with quantization='{format_},{STATIC}'"
    if is_stored:
        remedy = f"take a checkpoint with static scales, or an unquantized one and {remedy}"
    return (
        "TensorRT has no activation scales that are found at run time, token by token; "
        f"{remedy}, with lm_head=w8a16 or none where it is an LM head"
    )


def _static(arguments: dict[str, Any]) -> str:
    return "" if arguments["zero"] is None else NO_ACTIVATION_ZEROS


def _weight_only(arguments: dict[str, Any]) -> str:
    return "" if arguments["zero"] is None else NO_WEIGHT_ZEROS


def _experts(arguments: dict[str, Any]) -> str:
    if arguments["activations"] != NONE:
        return (
            "experts round each row by a scale of its own, and TensorRT has no activation scales "
            "that are found at run time; leave experts out (ignore=*experts*), or build with "
            "quantization='w8a16' or 'w4a16'"
        )
    return "" if arguments["up_zero"] is None else NO_WEIGHT_ZEROS


_RULES: tuple[tuple[tuple[Any, ...], Callable[[dict[str, Any]], str]], ...] = (
    (
        (ops.quantize_int8.default, ops.quantize_int8_asymmetric.default),
        lambda arguments: _dynamic("w8a8"),
    ),
    ((ops.quantize_fp8.default,), lambda arguments: _dynamic("fp8")),
    ((ops.quantize_static.default,), _static),
    ((ops.weight_only_linear.default,), _weight_only),
    ((ops.quantized_experts.default,), _experts),
)
