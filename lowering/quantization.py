"""The quantized graph: its plan, and what the engine is compared with instead of Hugging Face."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from inlay.backends.base import ModelLimits
from inlay.errors import VerificationError
from inlay.lowering.calibration_texts import calibration_samples
from inlay.lowering.export import MANY_TOKENS, Captured
from inlay.lowering.guards import References
from inlay.passes.check import Check, first_output
from inlay.passes.graph import is_call, module_of
from inlay.passes.quantize.calibrate import Batch, calibrate
from inlay.passes.quantize.config import NONE, QuantizationConfig, Scheme
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

SAMPLES_FILE = "calibration.jsonl"
"""In the artifact: with it and the options' quantization, calibration can be done again on other
weights, see passes/weights.py."""

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


def make_plan(
    config: QuantizationConfig,
    captured: Captured,
    tokenizer: Any,
    limits: ModelLimits,
    progress: Callable[[str], None],
) -> Plan:
    """What the pass needs to know: calibrated on the graph as it is after the fusions.

    Raises OptionError where calibration texts are needed and cannot be had.
    """
    if not config.needs_calibration:
        return Plan(config)
    longest = min(limits.max_seq_len, captured.max_num_tokens)
    samples = calibration_samples(config, tokenizer, limits.vocab_size, longest)
    total = sum(map(len, samples))
    progress(f"calibrate: {len(samples)} samples, {total} tokens")
    batches = packed_batches(samples, min(captured.max_num_tokens, MANY_TOKENS))
    given = calibrate(captured.graph, config, captured.sources.__getitem__, batches, progress)
    return Plan(config, given=given, samples=samples)


def packed_batches(samples: Sequence[Sequence[int]], max_num_tokens: int) -> list[Batch]:
    """Whole samples as requests in rows of at most max_num_tokens tokens, in their order."""
    rows: list[list[Sequence[int]]] = []
    room = 0
    for sample in samples:
        if len(sample) > room:
            rows.append([])
            room = max_num_tokens
        rows[-1].append(sample)
        room -= len(sample)
    return [_batch(row) for row in rows]


def _batch(samples: Sequence[Sequence[int]]) -> Batch:
    return {
        "input_ids": torch.cat([torch.tensor(sample) for sample in samples])[None],
        "position_ids": torch.cat([torch.arange(len(sample)) for sample in samples])[None],
        "logits_indices": torch.zeros(1, dtype=torch.int64),
    }


def write_samples(directory: Path, samples: Sequence[Sequence[int]]) -> None:
    """What calibration ran on, as a file that `calibration=` takes."""
    lines = [json.dumps({"token_ids": list(sample)}) for sample in samples]
    (directory / SAMPLES_FILE).write_text("\n".join(lines) + "\n")


@torch.inference_mode()
def quantized_references(
    before: GraphModule, after: GraphModule, references: References, check: Check
) -> References:
    """Logits of the quantized graph for the same requests, which an engine must give.

    Each quantized layer is compared first: given the inputs that it has without quantization, with
    what it gave before. Raises VerificationError naming the first one whose output has little to
    do with that, or where the logits as a whole have nothing to do with the model's any more.
    """
    num_tokens = sum(len(request.token_ids) for request in references.requests)
    every_row = {"logits_indices": torch.arange(num_tokens)}
    tensors = check.tensors
    whole = replace(
        check, tensors=lambda name: every_row[name] if name in every_row else tensors(name)
    )
    recorder = _Recorder(before, {node.meta["quantized"][0] for node in _quantized(after)})
    recorder.run(*whole.inputs(before))
    inputs = whole.inputs(after)
    _LayerCheck(after, recorder.values).run(*inputs)
    logits = first_output(Interpreter(after).run(*inputs))[0].float()
    rows = logits.split([len(request.token_ids) for request in references.requests])
    expected = torch.cat([request.logits for request in references.requests])
    error = references.error(expected, logits)
    if not error <= UNRELATED:
        raise VerificationError(
            f"quantization leaves nothing of the model: its logits are off by {error:.2g} of their "
            "RMS; take a format with more bits, a smaller group_size, or leave layers out (ignore=)"
        )
    requests = tuple(
        replace(request, logits=own) for request, own in zip(references.requests, rows, strict=True)
    )
    return replace(references, requests=requests, rounding=error)


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

    def __init__(self, gm: GraphModule, expected: Mapping[str, torch.Tensor]) -> None:
        super().__init__(gm)
        self._expected = expected

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if "quantized" not in n.meta:
            return result
        name, scheme = n.meta["quantized"]
        before = self._expected[name]
        error = _median_error(before, result)
        limit = _limit(n, scheme)
        if not error <= limit:
            raise VerificationError(
                f"quantization spoils layer {module_of(n)}: in the median token its output is off "
                f"by {error:.2g} of its size, allowed is {limit:.2g} for {scheme}; leave it out "
                f"(ignore={module_of(n)}), or take groups, smoothquant or another format"
            )
        return before


def _limit(node: Node, scheme: Scheme) -> float:
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
