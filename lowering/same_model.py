"""Is a checkpoint of the very model that an artifact was compiled from, but for its numbers?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from inlay.backends.artifact import Artifact
from inlay.backends.program import Program
from inlay.errors import ModelLoadError
from inlay.lowering.export import padding_token
from inlay.lowering.loading import Source
from inlay.lowering.stored_graph import mismatches
from inlay.passes.quantize.config import NONE

NOT_COMPUTED = re.compile(
    r"""(^|\.)(
    _name_or_path | name_or_path | architectures | auto_map | transformers_version | \w*version
    | dtype | torch_dtype | quantization_config | use_cache | return_dict | torchscript
    | output_(attentions|hidden_states|router_logits|scores)
    | \w*attn_implementation\w* | experts_implementation | _experts\w*
    | id2label | label2id | num_labels | problem_type | finetuning_task | task_specific_params
    | tokenizer_class | prefix | (bos|eos|pad|sep|cls|mask|decoder_start)_token_id
    | \w*dropout\w* | \w+_pdrop | \w*layer_?drop | drop_path_rate
    | initializer_\w+ | \w*aux_loss\w* | gradient_checkpointing
    | vision_config | audio_config
    )($|\.)""",
    re.VERBOSE,
)
"""Config entries that no number of a text model's forward pass depends on. Any other is taken for
one that the graph depends on: refusing too much costs a build."""

MOST_SHOWN = 12


def check_same_model(artifact: Artifact, source: Source, own: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelLoadError, naming what differs in the config and in the weights.

    own: parameters and buffers of the source's model.
    """
    found = config_differences(artifact, source) + mismatches(artifact, source.model, own)
    if found:
        more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        raise ModelLoadError(
            f"checkpoint {source.name} is not of the model that {artifact.path} was compiled for: "
            f"{'; '.join(found[:MOST_SHOWN])}{more}; build an artifact of its own with `inlay "
            "build`"
        )


def config_differences(artifact: Artifact, source: Source) -> list[str]:
    """Entries of the config that differ and that the graph may depend on, by name."""
    config = source.model.config
    stored = artifact.json("model/config.json")
    if stored["model_type"] != config.model_type:
        return [f"its model_type is {config.model_type} instead of {stored['model_type']}"]
    # Through the same class, so that defaults and old names are filled in alike.
    before = _flat(type(config).from_dict(stored).to_dict())
    now = _flat(type(config).from_dict(config.to_dict()).to_dict())
    found = [
        f"its {name} is {now.get(name)!r} instead of {before.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if not NOT_COMPUTED.search(name) and before.get(name) != now.get(name)
    ]
    token, due = padding_token(source.model), artifact.manifest["limits"]["padding_token"]
    return found if token == due else [*found, f"its pad_token_id is {token} instead of {due}"]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries by dotted names; numbers as plain data, as a file has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def check_stored(artifact: Artifact, source: Source) -> None:
    """Raises ModelLoadError where one of the two came from a quantized checkpoint, and the other
    did not."""
    was = any(recipe.get("origin") == "checkpoint" for recipe in artifact.recipes.values())
    if was and source.stored is None:
        raise ModelLoadError(
            f"checkpoint {source.name} is not quantized, and {artifact.path} was made of one that "
            "is and keeps such a one's numbers; give one that is quantized like it, or build anew"
        )
    if source.stored is not None and not was:
        quantization = artifact.manifest["options"].get("quantization", NONE)
        raise ModelLoadError(
            f"checkpoint {source.name} is quantized already, and {artifact.path} was built of "
            f"unquantized weights (quantization {quantization}); give such ones, or build anew"
        )


def check_program(name: str, artifact: Artifact, program: Program) -> None:
    """Raises ModelLoadError where new weights would have given another program than the artifact's:
    quantized unlike it."""
    was, would_be = _numbered(artifact.program), _numbered(program)
    if was == would_be:
        return
    pairs = zip(would_be["steps"], was["steps"], strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    where = "its number of steps" if at is None else f"its step {at}"
    raise ModelLoadError(
        f"checkpoint {name} does not give the program that {artifact.path} was compiled for: "
        f"{where} differs{_detail(would_be, was, at)}; where both are quantized checkpoints, they "
        "are quantized in unlike ways; build an artifact of its own with `inlay build`"
    )


def _detail(one: dict[str, Any], other: dict[str, Any], at: int | None) -> str:
    if at is None:
        return f" ({len(one['steps'])} instead of {len(other['steps'])})"
    now, before = one["steps"][at], other["steps"][at]
    names = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    parts = [f"{key} {now.get(key)} instead of {before.get(key)}" for key in names[:2]]
    return f" ({'; '.join(parts)})"


def _numbered(program: Program) -> dict[str, Any]:
    """A program with its values' names, which depend on a graph's history, as numbers."""
    numbers: dict[str, int] = {}

    def number(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [number(item) for item in value]
        return numbers.setdefault(value, len(numbers))

    named = ("inputs", "outputs", "query", "key", "value", "output")
    steps = [
        {key: number(value) if key in named else value for key, value in asdict(step).items()}
        for step in program.steps
    ]
    facts = {"hidden": number(program.hidden), "logits": number(program.logits)}
    return {"steps": steps, **facts, "dtype": program.dtype, "vocab_size": program.vocab_size}
