"""Which format a checkpoint has, by its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from inlay.errors import ModelLoadError, UnsupportedModelError
from inlay.lowering.quantized_checkpoint.awq import AWQ
from inlay.lowering.quantized_checkpoint.compressed_tensors import CompressedTensors
from inlay.lowering.quantized_checkpoint.finegrained_fp8 import FineGrainedFP8
from inlay.lowering.quantized_checkpoint.format import Facts, Format
from inlay.lowering.quantized_checkpoint.gptq import GPTQ
from inlay.lowering.quantized_checkpoint.modelopt import ModelOpt

KEYS = ("quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"

FORMATS: dict[str, Callable[[Facts], Format]] = {
    "compressed-tensors": CompressedTensors,
    "fp8": FineGrainedFP8,
    "gptq": GPTQ,
    "awq": AWQ,
    "modelopt": ModelOpt,
}
SUPPORTED = (
    "compressed-tensors (int8, fp8 and 4-bit weights), fp8 (blocks), gptq (4 and 8 bits), awq "
    "(gemm) and modelopt (FP8)"
)


def take_format(name: str, config: PretrainedConfig, local_files_only: bool) -> Format | None:
    """The format that a checkpoint's config tells of, None where its weights are plain.

    What the config says of it is taken out of it: the model that is built is an ordinary one.

    Raises UnsupportedModelError for other formats, by name.
    """
    facts, key = _take(config)
    if facts is None:
        file = cached_file(
            name,
            MODELOPT_FILE,
            local_files_only=local_files_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            return None
        facts, key = json.loads(Path(file).read_text()), MODELOPT_FILE
    if not isinstance(facts, dict):
        raise _unsupported(name, facts, key)
    method = facts.get("quant_method") or _producer(facts)
    if method == "compressed_tensors" or (method is None and "config_groups" in facts):
        method = "compressed-tensors"
    if method not in FORMATS:
        raise _unsupported(name, method, key)
    try:
        return FORMATS[method](facts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"checkpoint {name}: its {key} cannot be read ({type(error).__name__}: {error})"
        ) from error


def _unsupported(name: str, method: Any, key: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"checkpoint {name} is quantized with {method!r} ({key}), which is not supported; supported"
        f" are {SUPPORTED}; take one of these, or the float32, bfloat16 or float16 one"
    )


def _take(config: PretrainedConfig) -> tuple[Any, str]:
    """Remove and return the quantization part of a config, or of its text model's."""
    for key in KEYS:
        for holder in (config, config.get_text_config()):
            facts = getattr(holder, key, None)
            if facts is not None:
                for one in {id(config): config, id(holder): holder}.values():
                    if hasattr(one, key):
                        delattr(one, key)
                return (facts.to_dict() if hasattr(facts, "to_dict") else facts), key
    return None, ""


def _producer(facts: dict[str, Any]) -> Any:
    producer = facts.get("producer")
    return producer.get("name") if isinstance(producer, dict) else None
