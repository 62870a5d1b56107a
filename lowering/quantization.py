"""What a quantized model is made of: calibration, and the plan that the pass follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from inlay.backends.base import ModelLimits
from inlay.errors import OptionError
from inlay.lowering.calibration_texts import calibration_samples
from inlay.lowering.export import MANY_TOKENS, Captured
from inlay.lowering.loading import Source
from inlay.passes.quantize.calibrate import Batch, calibrate
from inlay.passes.quantize.config import NONE, QuantizationConfig, Scheme
from inlay.passes.quantize.plan import Plan
from inlay.passes.quantize.rewrite import MULTIPLE

SAMPLES_FILE = "calibration.jsonl"
"""In the artifact: with it and the options' quantization, calibration can be done again on other
weights, see passes/weights.py."""


LINEARS = torch.nn.Linear, Conv1D


def check_unquantized(quantization: Any, source: Source) -> None:
    """Raises OptionError where a checkpoint that is quantized already is to be quantized."""
    if quantization != NONE and source.stored is not None:
        kinds = sorted({scheme.weight for scheme in source.stored.schemes.values()})
        raise OptionError(
            f"checkpoint {source.name} is quantized already ({', '.join(kinds) or 'dequantized'}) "
            f"and keeps its own: quantization must be none, got {str(quantization)!r}; leave it "
            "out, or take an unquantized checkpoint"
        )


def check_calibration(quantization: Any) -> None:
    """Raises OptionError where calibration is to be a file that is not there."""
    file = "" if quantization == NONE else quantization.calibration
    if isinstance(file, str) and file and not Path(file).is_file():
        raise OptionError(f"calibration file {file!r} cannot be read: it is no file")


def check_ignored(quantization: Any, source: Source) -> None:
    """Raises OptionError for a pattern of layers to leave out that means none of the model's."""
    if quantization == NONE:
        return
    names = [name for name, _ in source.model.named_modules()]
    names += [name.removesuffix(".weight") for name, _ in source.model.named_parameters()]
    if unmatched := quantization.unmatched(names):
        linear = [n for n, m in source.model.named_modules() if isinstance(m, LINEARS)]
        raise OptionError(
            f"quantization: the ignore pattern {unmatched[0]!r} means no layer of {source.name}, "
            f"whose layers are {', '.join([*linear[:3], '...', *linear[-1:]])}"
        )


def sure_schemes(config: Any, source: Source | None = None) -> tuple[Scheme, ...]:
    """Schemes that layers will have for certain, as far as a config alone can tell, or with the
    model of a source too. Fewer than there are is no harm, what refuses them then does so later."""
    if source is not None and source.stored is not None:
        return tuple(dict.fromkeys(source.stored.schemes.values()))
    if config == NONE:
        return ()
    if source is None:
        return () if config.ignore else (config.layers,)
    head = source.model.get_output_embeddings()
    linear = {n: m for n, m in source.model.named_modules() if isinstance(m, LINEARS)}
    ignored = [m for name, m in linear.items() if config.ignores([name])]
    if any(m is not head for m in ignored):  # which keeps what is fused with it from it too
        return ()
    left = [m for m in linear.values() if m not in ignored]
    taken = [m for m in left if all(size % MULTIPLE == 0 for size in m.weight.shape)]
    num_layers = source.model.config.get_text_config().num_hidden_layers
    # A layer may have a router and a gate of shared experts, which are not quantized.
    schemes = (config.layers,) if len(taken) > 2 * num_layers + 1 else ()
    return (*schemes, config.head) if config.head is not None and head in taken else schemes


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
