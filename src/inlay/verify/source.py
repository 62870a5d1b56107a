"""Models with random weights, from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from inlay.errors import ModelLoadError, OptionError, UnsupportedModelError
from inlay.lowering.loading import Source, resolve
from inlay.lowering.options import DTYPES
from inlay.lowering.random_weights import randomise, seeded
from inlay.lowering.support import auto_class


def random_source(
    name: str,
    dtype: str = "auto",
    layers: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Source:
    """A model built from a config, its weights random ones that tell right from wrong.

    name: a directory, a config.json, a hub id, "demo", or a model type of transformers, which
    gives its default config. layers: make it this deep. trust_remote_code: run Python code that
    comes with the config. The model has no tokenizer.

    Raises:
        ModelLoadError: there is no such config. OptionError: layers is not of the model's.
        UnsupportedModelError: transformers has no causal LM for it.
    """
    config = _config(name, trust_remote_code)
    if layers is not None:
        config = with_layers(config, layers)
    wanted = DTYPES.get(dtype, getattr(config, "dtype", None) or torch.float32)
    try:
        with seeded(seed):
            model = auto_class(config).from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise UnsupportedModelError(f"model {name!r} cannot be built: {_said(error)}") from error
    except Exception as error:  # a config's wrong value may raise anything in transformers
        raise ModelLoadError(
            f"model {name!r} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    return Source(randomise(model.eval(), seed), None, name)


def _config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    place = resolve(name)
    if not Path(place).exists() and place in CONFIG_MAPPING:
        return CONFIG_MAPPING[place]()
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config's wrong value may raise anything in transformers
        raise ModelLoadError(
            f"model {name!r} has no config that can be read; give a directory, a config.json, a "
            "hub id, or a model type that transformers knows (llama, qwen3, ...). transformers "
            f"says: {type(error).__name__}: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    """The first line of an error's text, which may be empty."""
    return next(iter(str(error).splitlines()), "no message")


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The config of a shallower model of the same kind: lists with an entry a layer are cut, and
    the last entries changed so that every kind of layer is still there."""
    depth = config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise OptionError(f"layers must be from 1 to the model's {depth}, got {layers}")
    config.num_hidden_layers = layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and depth > 1:
            setattr(config, name, _shortened(value, layers))
    return config


def _shortened(entries: list[Any], count: int) -> list[Any]:
    kept = entries[:count]
    missing = [entry for entry in dict.fromkeys(map(_key, entries)) if entry not in map(_key, kept)]
    for place, key in zip(reversed(range(count)), missing, strict=False):
        kept[place] = next(entry for entry in entries if _key(entry) == key)
    return kept


def _key(entry: Any) -> str:
    return repr(entry)
