"""What is wrong with a checkpoint, said before or instead of what transformers says."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

from inlay.errors import InlayError, ModelLoadError, UnsupportedModelError

FLOATING = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors names them."""


def check_place(name: str) -> None:
    directory = Path(name)
    if (name.startswith((".", "/", "~")) or name.count("/") != 1) and not directory.is_dir():
        raise ModelLoadError(f"model {name!r} is not a directory, a hub id (owner/name) or 'demo'")
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise ModelLoadError(
            f"directory {name or '.'} has no config.json: it is not a Hugging Face model (an Inlay "
            "artifact has inlay.json; load it with Engine.load)"
        )


def check_files(name: str, quantized: bool = False) -> None:
    """Refuse what transformers takes for a model of floating-point weights and is none.

    quantized: the config says that weights are not, and they were read accordingly.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"checkpoint {name} holds an adapter (adapter_config.json), which would not be applied;"
            " merge it (PEFT: model.merge_and_unload(), then save_pretrained), or remove it"
        )
    for file in () if quantized else sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (it is no mapping)
                kind = tensors.get_slice(key).get_dtype()
                if key.endswith("weight") and kind not in FLOATING:
                    raise UnsupportedModelError(
                        f"checkpoint {name} is quantized: {key} in {file.name} is {kind}, and its "
                        "config has no quantization_config that says how; allowed without are "
                        f"{', '.join(FLOATING)}; take the float32, bfloat16 or float16 one"
                    )


def check_finite(name: str, model: PreTrainedModel) -> None:
    for key, tensor in model.named_parameters():
        low, high = tensor.detach().aminmax() if tensor.numel() else (tensor, tensor)
        if not (low.isfinite().all() and high.isfinite().all()):  # NaN is both
            raise ModelLoadError(
                f"model {name} holds NaN or infinity in {key}, so its outputs would too; "
                "take an undamaged one, or another dtype if it overflowed in this one"
            )


def guarded(name: str, load: Any) -> Any:
    """Run a transformers loader and say plainly what went wrong."""
    directory = Path(name)
    try:
        return load()
    except InlayError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"checkpoint {name} cannot be read: a .bin file is damaged or holds Python objects "
            f"other than tensors{_what_pickle(error)}, which are never unpickled, since that can "
            "run any code; take the checkpoint's safetensors, or convert it where you trust it"
        ) from error
    except (SafetensorError, json.JSONDecodeError, EOFError, RuntimeError) as error:
        raise ModelLoadError(
            f"checkpoint {name} cannot be read: {error}; a file is damaged or truncated, "
            "download it again"
        ) from error
    except OSError as error:
        if directory.is_dir():
            raise ModelLoadError(f"checkpoint {name} cannot be read: {error}") from error
        raise ModelLoadError(
            f"model {name!r} is not a local directory and the Hugging Face hub cannot give it "
            "(no network, HF_HUB_OFFLINE set, or no such model); download it first, or name a "
            f"directory. transformers says: {str(error).splitlines()[0]}"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(f"model {name} cannot be loaded: {error}") from error
    except Exception as error:  # a config's wrong value may raise anything in transformers
        raise ModelLoadError(
            f"checkpoint {name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _what_pickle(error: pickle.UnpicklingError) -> str:
    """What torch named as not allowed; not its advice to allow it."""
    found = re.search(r"unsupported \w+:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
    return f" ({found[1]})" if found and not found[1].isdigit() else ""
