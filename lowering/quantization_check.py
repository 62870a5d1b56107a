"""The quantized graph judged: layer by layer, and as what the engine is compared with.

An engine of a quantized model cannot be compared with Hugging Face closely enough to tell a fault
from rounding. So the graph is judged where rounding has hardly gone anywhere, at each layer by
itself, and the engine is then compared with the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from inlay.errors import VerificationError
from inlay.lowering.guards import References, every_row
from inlay.passes.check import Check, first_output
from inlay.passes.graph import is_call, module_of
from inlay.passes.quantize.config import NONE, Scheme

UNRELATED = 1.0
"""Relative RMS error beyond which rounded logits tell nothing of the model's: those of another
model would be off by 1.4."""


LAYER_LIMITS = {"int8": 0.05, "int4": 0.2, "fp8": 0.15}
ROUGH_LIMIT = 0.35
ROUNDED_INPUTS = 0.25
"""Relative error of a layer's output that rounding may cause in the median token, by its weight;
of int4 without groups; and where its inputs are rounded too, which may have outliers. Usual are
0.007, 0.08 and 0.03; 0.11; 0.02. A lost zero point, numbers or scales in a wrong order or of a
wrong layer are beyond. Experts are two products, and may have twice as much."""

STORED_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""The same of a checkpoint's own numbers, where inputs are not rounded: the layer before has these
rounded to the engine's dtype, nothing else differs. In float32 sums are taken in another order.
Static scales are of calibration texts, and may cut much off what random tokens give."""

logger = logging.getLogger(__name__)


@torch.inference_mode()
def quantized_references(
    before: GraphModule,
    after: GraphModule,
    references: References,
    check: Check,
    stored: bool = False,
) -> References:
    """Logits of the quantized graph for the same requests, which an engine must give.

    Each quantized layer is compared first: given the inputs that it has without quantization, with
    what it gave before. Raises VerificationError naming the first one whose output has little to
    do with that, or where the logits as a whole have nothing to do with the model's any more.
    stored: the checkpoint was quantized already, and the model holds what its numbers mean.
    """
    whole = every_row(check, references)
    recorder = _Recorder(before, {node.meta["quantized"][0] for node in _quantized(after)})
    recorder.run(*whole.inputs(before))
    inputs = whole.inputs(after)
    _LayerCheck(after, recorder.values, stored).run(*inputs)
    logits = first_output(Interpreter(after).run(*inputs))[0].float()
    rows = logits.split([len(request.token_ids) for request in references.requests])
    expected = torch.cat([request.logits for request in references.requests])
    error = references.error(expected, logits)
    if not error <= UNRELATED:
        advice = "take a format with more bits, a smaller group_size, or leave layers out (ignore=)"
        if stored:
            advice = "the checkpoint's activation scales are not for this model, or are damaged"
        raise VerificationError(
            f"quantization leaves nothing of the model: its logits are off by {error:.2g} of their "
            f"RMS; {advice}"
        )
    requests = tuple(
        replace(request, logits=own) for request, own in zip(references.requests, rows, strict=True)
    )
    own = tuple(request.logits for request in references.requests)
    return replace(references, requests=requests, rounding=error, exact=own)


def _quantized(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if "quantized" in node.meta]


class _Recorder(Interpreter):
    """Keeps what the nodes of these names give."""

    def __init__(self, gm: GraphModule, names: Collection[str]) -> None:
        super().__init__(gm)
        self._names = names
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = result
        return result


class _LayerCheck(Interpreter):
    """Compares each quantized layer's output, and goes on with what the layer itself gave."""

    def __init__(self, gm: GraphModule, expected: Mapping[str, torch.Tensor], stored: bool) -> None:
        super().__init__(gm)
        self._expected, self._stored = expected, stored

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if "quantized" not in n.meta:
            return result
        name, scheme = n.meta["quantized"]
        before = self._expected[name]
        error = _median_error(before, result)
        limit, advice = self._limit(n, scheme, before.dtype)
        # Static scales: an output of zeros is off by 1, which no rounding is.
        if not (error < limit if scheme.static else error <= limit):
            raise VerificationError(
                f"quantization spoils layer {module_of(n)}: in the median token its output is off "
                f"by {error:.2g} of its size, allowed is {limit:.2g} for {scheme}; {advice}"
            )
        if scheme.static and error > ROUNDED_INPUTS:
            logger.warning(
                "the activation scale of %s cuts much off the inputs that random tokens give: its "
                "output is off by %.2g of its size",
                module_of(n),
                error,
            )
        return before

    def _limit(self, node: Node, scheme: Scheme, dtype: torch.dtype) -> tuple[float, str]:
        """The error allowed, and what to do about a larger one."""
        if self._stored and scheme.activation == NONE:
            fault = "this is a fault of the checkpoint's reader, please report it"
            return STORED_LIMITS[dtype], fault
        limit = UNRELATED if scheme.static else rounding_limit(node, scheme)
        if self._stored:
            return limit, "the checkpoint's activation scales are damaged, or of another model"
        where = module_of(node)
        return limit, (
            f"leave it out (ignore={where}), or take groups, smoothquant or another format"
        )


def rounding_limit(node: Node, scheme: Scheme) -> float:
    """How far from its layer a quantized layer's output may be, see LAYER_LIMITS."""
    limit = LAYER_LIMITS[scheme.weight]
    if scheme.weight == "int4" and not scheme.group_size:
        limit = ROUGH_LIMIT
    if scheme.activation != NONE:
        limit = ROUNDED_INPUTS
    return 2 * limit if is_call(node, torch.ops.inlay.quantized_experts.default) else limit


def _median_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Of the rows' relative errors; NaN where either is not finite. Rows of zeros count as right
    where they stay so."""
    wide = expected.flatten(0, -2).float()
    off = (got.flatten(0, -2).float() - wide).norm(dim=-1)
    return float((off / wide.norm(dim=-1).clamp_min(1e-20)).median())
