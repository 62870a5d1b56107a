"""What can be captured: models that are what their config says and show all they compute.

No table of architectures decides. What a model does is read off its classes, its config and the
captured graph; whether the result is right, the guards measure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from inlay.errors import UnsupportedModelError
from inlay.passes.graph import calls, is_within, module_of

UNUSED = (
    "training",
    "gradient_checkpointing",
    "vocab_size",
    "max_seq_len_cached",
    "attn_implementation",
)
"""Attributes of modules that change nothing in evaluation mode, and which transformers itself lets
differ from the config (resize_token_embeddings leaves one vocab_size behind, dynamic RoPE notes
the longest request that it has seen)."""

NEEDED = (
    "what would be needed: a form of this layer that is traced for any number of tokens and keeps "
    "its state per request"
)

FIXED_SIZES = (
    "what would be needed: sizes that do not depend on numbers, as those of experts called through "
    "transformers' registry"
)

REMOTE_CODE = "transformers_modules."
"""Where transformers puts the classes that a checkpoint brings with it (trust_remote_code)."""


class NotCapturableError(UnsupportedModelError):
    """One way to capture a model does not work; another may."""


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by name, what cannot be captured faithfully.

    Raises:
        UnsupportedModelError: neither a causal LM nor an encoder, or a model whose modules were
            patched, hooked or wrapped (their code would not be what is captured).
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}; "
            "merge and unload adapters (PEFT: model.merge_and_unload()) first"
        )
    check_config(model.config)
    kind, expected = type(model), model_classes(type(model.config))
    if kind not in expected and not kind.__module__.startswith(REMOTE_CODE):
        given = f"{model.config.model_type!r} model of class {kind.__module__}.{kind.__name__}"
        if not expected:
            raise UnsupportedModelError(
                f"model must be a causal LM or an encoder, and transformers has neither for a "
                f"{given}"
            )
        names = ", ".join(one.__name__ for one in expected)
        raise UnsupportedModelError(
            f"model must be the causal LM or the encoder that transformers has for its config "
            f"({names}), got a {given}; load it with the Auto class of one of those"
        )
    for name, module in model.named_modules():
        _check_module(name, module)


def model_classes(config: type[PretrainedConfig]) -> list[type]:
    """What can be captured of this config: its causal LM, the model that it is the text tower of
    together with images, its bare model where that is an encoder."""
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    if config in MODEL_FOR_MASKED_LM_MAPPING:
        mappings.append(MODEL_MAPPING)
    found = [mapping[config] for mapping in mappings if config in mapping]
    return list(dict.fromkeys(one for one in found if isinstance(one, type)))


def auto_class(config: PretrainedConfig) -> Any:
    """Which of transformers' Auto classes loads what can be captured of a checkpoint.

    What the checkpoint was saved from (`architectures`) decides where its config has several
    kinds of model: BERT's may be an encoder or a decoder.
    """
    kind, saved = type(config), set(getattr(config, "architectures", None) or ())
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    image = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    if causal is not None and causal.__name__ in saved:
        return AutoModelForCausalLM
    if image is not None and (causal is None or image.__name__ in saved):
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder:
        return AutoModel
    return AutoModelForCausalLM


def check_config(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError for the config of a model in memory that is quantized."""
    for name in ("quantization_config", "compression_config"):
        if (how := getattr(config, name, None)) is not None:
            facts = how.to_dict() if hasattr(how, "to_dict") else how
            method = facts.get("quant_method") if isinstance(facts, dict) else facts
            raise UnsupportedModelError(
                f"models quantized with {method!r} ({name}) in memory are not supported; give the "
                "checkpoint's directory or hub id, or take the float32, bfloat16 or float16 one"
            )


def _check_module(name: str, module: torch.nn.Module) -> None:
    kind = type(module)
    where = f"module {name or '(root)'} ({kind.__module__}.{kind.__name__})"
    if not kind.__module__.startswith(("transformers.", "torch.nn.modules.", REMOTE_CODE)):
        raise UnsupportedModelError(
            f"{where} is not one of transformers' or torch's own: wrapped or patched models "
            "are not captured; unwrap it (PEFT: model.merge_and_unload()) first"
        )
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # Those of transformers only record outputs or ask for gradients.
    foreign = [hook for hook in hooks if not _module_of(hook).startswith("transformers.")]
    replaced = [name for name, value in vars(module).items() if callable(value)]
    replaced = [name for name in replaced if hasattr(kind, name) and name != "_compiled_call_impl"]
    if replaced or foreign:
        raise UnsupportedModelError(
            f"{where} has {'a replaced ' + replaced[0] if replaced else 'forward hooks'}, which a "
            "graph would lose; remove it first"
        )


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", ""))


def check_structure(model: PreTrainedModel, shell: PreTrainedModel) -> None:
    """The shell is made of the config: what was changed in the model by hand would be lost."""
    given, made = dict(model.named_modules()), dict(shell.named_modules())
    for name in {**made, **given}:
        theirs, ours = _facts(given.get(name)), _facts(made.get(name))
        for key in {**ours, **theirs}:
            if theirs.get(key) != ours.get(key):
                raise UnsupportedModelError(
                    f"module {name or '(root)'} is not what the model's config describes: its "
                    f"{key} is {theirs.get(key)!r} instead of {ours.get(key)!r}; models whose "
                    "modules were replaced or changed by hand are not captured"
                )


def _facts(module: torch.nn.Module | None) -> dict[str, Any]:
    """What a module computes with, tensors and submodules aside: its class, its numbers, words and
    functions. What is None is not there."""
    if module is None:
        return {"class": None}
    facts = {
        name: _named(value) if callable(value) else value
        for name, value in vars(module).items()
        if (isinstance(value, int | float | str | tuple | list) or callable(value))
        and not name.startswith("_")
        and name not in UNUSED
        and not re.search("dropout|loss|jitter", name)
        and (name != "padding_idx" or hasattr(module, "create_position_ids_from_input_ids"))
    }
    names = [*module._parameters, *module._buffers]
    return {"class": type(module).__name__, "tensors": sorted(names), **facts}


def _named(function: Any) -> Any:
    """What tells a function from another one of the same kind."""
    if isinstance(function, functools.partial):
        return _named(function.func), function.args, function.keywords
    return getattr(function, "__qualname__", type(function).__qualname__)


def check_calls(model: PreTrainedModel, gm: GraphModule, experts: Iterable[str]) -> None:
    """Every decoder layer of the graph must have called attention, every experts module experts.

    experts: names of the modules that route tokens to experts.

    Raises NotCapturableError that names the layers which mix tokens, or would, unseen.
    """
    owners = [module_of(node) for node in calls(gm, torch.ops.inlay.attention.default)]
    if not owners:
        raise NotCapturableError(
            f"no attention is in its graph: its modules ({describe_mixers(model)}) mix tokens "
            f"otherwise; {NEEDED}"
        )
    layers = _layer_list(model, owners)
    silent = [name for name in layers if not any(is_within(owner, name) for owner in owners)]
    if silent:
        kinds = {f"{name} ({describe_mixers(model.get_submodule(name))})" for name in silent[:3]}
        raise NotCapturableError(
            f"{len(silent)} of its {len(layers)} layers do not call attention: "
            f"{', '.join(sorted(kinds))}, and mix tokens otherwise; {NEEDED}"
        )
    routed = [module_of(node) for node in calls(gm, torch.ops.inlay.experts.default)]
    unrouted = [name for name in experts if not any(is_within(owner, name) for owner in routed)]
    if unrouted:
        raise NotCapturableError(
            f"experts module {unrouted[0]} ({type(model.get_submodule(unrouted[0])).__name__}) is "
            "not called in the captured graph"
        )


def _layer_list(model: PreTrainedModel, owners: Iterable[str]) -> list[str]:
    """The names of the layers beside those that call attention: members of one module list."""
    lists = dict.fromkeys(m[1] for owner in owners if (m := re.match(r"(.*?)\.\d+(\.|$)", owner)))
    return [f"{name}.{index}" for name in lists for index in range(len(model.get_submodule(name)))]


def describe_mixers(module: torch.nn.Module) -> str:
    """Classes of the parts that may mix tokens: neither linear layers, norms nor activations."""
    plain = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Dropout, torch.nn.ModuleList)
    kinds = {
        type(part).__name__: None
        for part in module.modules()
        if part is not module
        and not isinstance(part, plain)
        and not re.search(r"Norm|MLP|Activation|Rotary|SiLU|GELU|Layer$", type(part).__name__)
    }
    return ", ".join(list(kinds)[:4]) or type(module).__name__
