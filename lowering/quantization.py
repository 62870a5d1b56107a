"""The quantized graph: its plan, and what the engine is compared with instead of Hugging Face."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inlay.backends.base import ModelLimits
from inlay.errors import VerificationError
from inlay.lowering.calibration_texts import calibration_samples
from inlay.lowering.export import MANY_TOKENS, Captured
from inlay.lowering.guards import References
from inlay.passes.check import Check
from inlay.passes.quantize.calibrate import Batch, calibrate
from inlay.passes.quantize.config import QuantizationConfig
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

SAMPLES_FILE = "calibration.jsonl"
"""In the artifact: with it and the options' quantization, calibration can be done again on other
weights, see passes/weights.py."""

UNRELATED = 1.0
"""Relative RMS error beyond which rounded logits tell nothing of the model's: those of another
model would be off by 1.4."""


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
