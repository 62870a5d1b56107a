"""Calibration: one run over texts, in which each layer is rounded in view of its own inputs.

The layers before it are rounded already, so that a layer sees what it will be given by the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from inlay.passes.graph import is_call
from inlay.passes.quantize.config import QuantizationConfig, Scheme
from inlay.passes.quantize.gptq import gptq, gram
from inlay.passes.quantize.plan import Plan
from inlay.passes.quantize.rewrite import EMBEDDING, EXPERTS, LINEAR, accepted, head_of
from inlay.passes.quantize.rounding import quantize_weight
from inlay.passes.quantize.smoothing import awq, smoothquant
from inlay.passes.quantize.static_scales import Range, find_range, static_scale
from inlay.passes.quantized_ops import dequantize
from inlay.passes.weights import WeightMaker

ops = torch.ops.inlay
logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
"""The step inputs of whole requests in one row: input_ids and position_ids [1, T]."""

Parts = dict[str, Tensor]
"""What calibration decides for one weight: some of plan.PARTS."""

NUM_REPORTS = 8
"""Lines of progress."""


@torch.no_grad()
def calibrate(
    gm: GraphModule,
    config: QuantizationConfig,
    weight: Callable[[str], Tensor],
    batches: Sequence[Batch],
    progress: Callable[[str], None],
) -> dict[str, Tensor]:
    """Parts by name ("W.values", "W.smooth", "W.input_scale" ...) for the weights of a graph that
    is fused and not yet quantized.

    weight: the checkpoint's, by name. batches: what to run on. Every node is run on all batches
    before the next one is, and its values go when nothing reads them any more, so that memory holds
    the widest layer's activations and one weight of a layer beside the checkpoint. Experts run as
    they are, and are rounded to nearest later. The LM head has a scheme of its own and is not run.
    """
    plan, head = Plan(config), head_of(gm)
    schemes = {node: scheme for node, scheme in accepted(gm, plan) if node is not head}
    experts = [node for node in schemes if is_call(node, EXPERTS)]
    if experts:
        logger.warning(
            "the experts of %d layers are rounded to nearest, their activations by a scale for "
            "each row: %s and static scales are for other layers",
            len(experts),
            config.method,
        )
    layers = _Layers(config)
    todo = [node for node in schemes if is_call(node, LINEAR)]
    step = max(-(-len(todo) // NUM_REPORTS), 1)

    def call(node: Node, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if is_call(node, LINEAR) and node in schemes:
            results = layers.linear(node, schemes[node], arguments)
            done = todo.index(node) + 1
            if done % step == 0 or done == len(todo):
                progress(f"calibrate: layer {done} of {len(todo)}")
            return results
        results = [node.target(*args, **kwargs) for args, kwargs in arguments]
        return _rounded_rows(results) if is_call(node, EMBEDDING) and node in schemes else results

    if todo:
        run_together(gm, batches, WeightMaker(gm.meta["recipes"], weight), call, todo[-1])
    return layers.given


def run_together(
    gm: GraphModule,
    batches: Sequence[Batch],
    weight: Callable[[str], Tensor],
    call: Callable[[Node, Sequence[tuple[Any, ...]]], list[Any]],
    last: Node,
) -> None:
    """Run a graph up to a node on several batches, each node on all of them before the next.

    call is given a node and (args, kwargs) for each batch, and gives the results. A weight is made
    when a node reads it.
    """
    dying = _last_readings(gm)
    values: dict[Node, list[Any]] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if "input" in node.meta:
                values[node] = [batch[node.meta["input"]] for batch in batches]
            continue
        reads = [read for read in node.all_input_nodes if "weight" in read.meta]
        weights = {read: weight(read.meta["weight"]) for read in reads}
        arguments = [
            map_arg(
                (node.args, node.kwargs),
                lambda read, i=i, own=weights: own[read] if read in own else values[read][i],
            )
            for i in range(len(batches))
        ]
        values[node] = call(node, arguments)
        if node is last:
            return
        for read in dying.get(node, ()):
            values.pop(read, None)


class _Layers:
    """Decides layer by layer; given: what was decided, by name.

    A weight that several layers share is decided where it is used first; a static scale is then
    widened to hold the inputs of all.
    """

    def __init__(self, config: QuantizationConfig) -> None:
        self.given: dict[str, Tensor] = {}
        self._config = config
        self._parts: dict[str, Parts] = {}
        self._ranges: dict[str, Range] = {}

    def linear(
        self, node: Node, scheme: Scheme, arguments: Sequence[tuple[Any, ...]]
    ) -> list[Tensor]:
        """The quantized layer's outputs, one for each batch."""
        inputs = [args[0] for args, _ in arguments]
        _, weight, *bias = arguments[0][0]
        name = node.args[1].meta["weight"]
        parts = self._parts.get(name) or self._decide(inputs, weight, scheme)
        if "smooth" in parts:
            inputs = [x / parts["smooth"] for x in inputs]
            weight = weight.float() * parts["smooth"]
        if scheme.static:
            parts |= self._static(name, inputs, weight, scheme)
        self._parts[name] = parts
        self.given |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if "values" in parts:
            numbers = parts["values"], parts["scales"], parts.get("zeros")
        else:
            numbers = quantize_weight(weight, scheme)
        dtype = node.meta["val"].dtype
        return _outputs(inputs, numbers, bias[0] if bias else None, parts, scheme, dtype)

    def _decide(self, inputs: Sequence[Tensor], weight: Tensor, scheme: Scheme) -> Parts:
        """What the method finds, before any static scale."""
        method = self._config.method
        if method == "smoothquant":
            return {"smooth": smoothquant(inputs, weight, self._config.smoothing)}
        if method == "awq":
            return {"smooth": awq(inputs, weight, scheme)}
        if method == "gptq":
            made = zip(
                ("values", "scales", "zeros"), gptq(weight, gram(inputs), scheme), strict=True
            )
            return {part: tensor for part, tensor in made if tensor is not None}
        return {}

    def _static(self, name: str, inputs: Sequence[Tensor], weight: Tensor, scheme: Scheme) -> Parts:
        low, high = find_range(inputs, weight, scheme)
        before = self._ranges.get(name, (low, high))
        self._ranges[name] = min(low, before[0]), max(high, before[1])
        return static_scale(self._ranges[name], scheme)


def _outputs(
    inputs: Sequence[Tensor],
    numbers: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    parts: Parts,
    scheme: Scheme,
    dtype: torch.dtype,
) -> list[Tensor]:
    """What rewrite.py's ops make of a layer's smoothed inputs; weights that are narrow alone are
    multiplied as numbers of dtype, which BLAS does at full speed."""
    values, scales, zeros = numbers
    if scheme.activation == "none":
        wide = dequantize(values, scales, zeros).to(dtype)
        return [F.linear(x.to(dtype), wide, bias) for x in inputs]
    if scheme.activation == "fp8":
        pairs = [_quantized(x, parts, scheme) for x in inputs]
        return [ops.fp8_linear(q, s, values, scales, bias, dtype) for q, s, _ in pairs]
    triples = [_quantized(x, parts, scheme) for x in inputs]
    return [ops.int8_linear(q, s, z, values, scales, bias, dtype) for q, s, z in triples]


def _quantized(x: Tensor, parts: Parts, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """(numbers, scale, zero point or None) of a layer's input, as rewrite.py quantizes it."""
    if scheme.static:
        scale, zero = parts["input_scale"], parts.get("input_zero")
        return ops.quantize_static(x, scale, zero, scheme.activation), scale, zero
    if scheme.activation == "fp8":
        return *ops.quantize_fp8(x, scheme.group_size), None
    if scheme.activation_symmetric:
        return *ops.quantize_int8(x), None
    q, scale, zero = ops.quantize_int8_asymmetric(x)
    return q, scale, zero


def _rounded_rows(rows: Sequence[Tensor]) -> list[Tensor]:
    """What an int8 embedding with a scale for each row looks up."""
    return [dequantize(*quantize_weight(x[0], Scheme("int8")))[None].to(x.dtype) for x in rows]


def _last_readings(gm: GraphModule) -> dict[Node, list[Node]]:
    """The values that nothing reads any more after a node."""
    seen: set[Node] = set()
    dying: dict[Node, list[Node]] = {}
    for node in reversed(gm.graph.nodes):
        dying[node] = [read for read in node.all_input_nodes if read not in seen]
        seen.update(dying[node])
    return dying
