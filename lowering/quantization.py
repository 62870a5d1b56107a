"""The quantized graph: its plan, and what the engine is compared with instead of Hugging Face."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from inlay.errors import VerificationError
from inlay.lowering.export import Captured
from inlay.lowering.guards import References
from inlay.passes.check import Check
from inlay.passes.quantize.config import QuantizationConfig
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

UNRELATED = 1.0
"""Relative RMS error beyond which rounded logits tell nothing of the model's: those of another
model would be off by 1.4."""


def make_plan(
    config: QuantizationConfig,
    captured: Captured,
    tokenizer: Any,
    progress: Callable[[str], None],
) -> Plan:
    """What the pass needs to know: calibrated on the graph as it is after the fusions.

    Raises OptionError where calibration texts are needed and cannot be had.
    """
    return Plan(config)


@torch.inference_mode()
def quantized_references(captured: Captured, references: References, check: Check) -> References:
    """Logits of the quantized graph for the same requests, which an engine must give.

    Raises VerificationError where they have nothing to do with the model's any more.
    """
    num_tokens = sum(len(request.token_ids) for request in references.requests)
    every_row = {"logits_indices": torch.arange(num_tokens)}
    tensors = check.tensors
    whole = replace(
        check, tensors=lambda name: every_row[name] if name in every_row else tensors(name)
    )
    logits = whole.run(captured.graph)[0].float()
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
