"""From what a user names (a model, a directory, a hub id, "demo") to a Hugging Face model."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import safe_open
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file

from inlay.errors import ModelLoadError, OptionError, UnsupportedModelError
from inlay.lowering.capture import REFERENCE, share_tensors, without_pooler
from inlay.lowering.checkpoint import check_files, check_finite, check_place, guarded
from inlay.lowering.options import DTYPES
from inlay.lowering.quantized_checkpoint.formats import take_format
from inlay.lowering.quantized_checkpoint.placing import plan_of
from inlay.lowering.quantized_checkpoint.reader import QuantizedFiles
from inlay.lowering.support import auto_class, check_supported
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.plan import Plan

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The name of the small trained model that ships with the package."""

HUB_TIMEOUT = 5.0
"""Seconds for the hub's first answer."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
"""What a directory with a tokenizer has at least one of."""

POOLING_FILE = "1_Pooling/config.json"
"""Where sentence-transformers says how a checkpoint's hidden states become an embedding."""


_patching = threading.Lock()


@dataclass
class Source:
    """A model, the tokenizer that belongs to it (None where it has none), and what to call it in
    an `inlay build` command. stored: of a checkpoint that is quantized already, its layers'
    schemes and parts; the model then holds the numbers that these stand for."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    stored: Plan | None = None


def demo_path() -> Path:
    import inlay

    return Path(inlay.__file__).parent / "demo_model"


def resolve(model: str | os.PathLike[str]) -> str:
    """A directory or hub id; "demo" is the shipped model."""
    return str(demo_path()) if str(model) == DEMO else str(model)


def load_source(
    model: PreTrainedModel | str | os.PathLike[str],
    dtype: str,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    look: Callable[[str, tuple[Scheme, ...]], None] = lambda dtype, schemes: None,
) -> Source:
    """Load through `from_pretrained`: its conversion mapping, ties, buffers and memory maps.

    A checkpoint that is quantized already gives an ordinary model of the weights that its numbers
    stand for, and the numbers themselves in `Source.stored`.

    dtype: a key of DTYPES, or "auto" for the checkpoint's own. An in-memory model of another
    dtype is converted into a copy; it is never changed itself. trust_remote_code: run Python code
    that comes with the checkpoint, where its config names such. look: called before weights are
    read, with the dtype they will have ("" where their files say it) and schemes of the
    checkpoint's own quantization; what it raises is raised.

    Raises:
        ModelLoadError: no such directory, hub not reachable, damaged or incomplete files.
        UnsupportedModelError: an architecture that is not supported, a model that was changed.
        OptionError: no tokenizer where one was named, "auto" and a dtype not in DTYPES.
    """
    if isinstance(model, str | os.PathLike):
        name = resolve(model)
        check_place(name)
        options = _hub_options(name, trust_remote_code)
        config = guarded(name, lambda: _load_config(name, options))
        local = options["local_files_only"]
        format_ = guarded(name, lambda: take_format(name, config, local))
        files, wanted = None, DTYPES.get(dtype)
        if format_ is not None:
            wanted = wanted or config.dtype or config.get_text_config().dtype or format_.dtype
            files = QuantizedFiles(format_, wanted)
        look(dtype_name(wanted or config.dtype), () if format_ is None else format_.sure_schemes)
        loaded = guarded(name, lambda: _load(name, wanted, config, options, files))
        guarded(name, lambda: check_files(name, files is not None))
        if tokenizer is None:
            tokenizer = load_tokenizer(name, trust_remote_code)
        else:
            tokenizer = _given_tokenizer(tokenizer)
        stored = None if files is None else plan_of(name, loaded, files)
        source = Source(loaded, tokenizer, str(model), stored)
    else:
        check_supported(model)
        tokenizer = None if tokenizer is None else _given_tokenizer(tokenizer)
        converted = _converted(model, DTYPES.get(dtype, model.dtype))
        source = Source(converted, tokenizer, "MODEL")
    check_finite(source.name, source.model)
    if source.model.dtype not in DTYPES.values():
        raise OptionError(
            f"dtype 'auto' takes the model's own, {source.model.dtype}, which is not one of "
            f"{', '.join(DTYPES)}; give one of these"
        )
    return source


def dtype_name(dtype: torch.dtype | None) -> str:
    """As programs and options have it; "" of None."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _hub_options(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of from_pretrained: no code of a checkpoint's unasked, and no hub that is away."""
    local = Path(name).is_dir() or not _hub_answers()
    return {"local_files_only": local, "trust_remote_code": trust_remote_code}


def _hub_answers() -> bool:
    """Asked once and briefly: the hub's client retries each file for 20 seconds and more."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # the client's own classes change between its versions
        logger.warning("%s does not answer (%s): local files only", constants.ENDPOINT, error)
        return False
    return True


def _load_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    """The config; code that the checkpoint brings is refused where nothing else can run it."""
    facts, _ = PretrainedConfig.get_config_dict(name, local_files_only=options["local_files_only"])
    code = facts.get("auto_map")
    if code and not options["trust_remote_code"]:
        if facts.get("model_type") not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"model {name} brings Python code of its own (auto_map in its config.json: "
                f"{', '.join(map(str, code.values()))}), which is not run unasked; read it, and "
                "if you trust it pass trust_remote_code=True (--trust-remote-code)"
            )
        logger.info("%s brings code of its own, transformers' is used instead: %s", name, code)
    return AutoConfig.from_pretrained(name, **options)


def _load(
    name: str,
    dtype: torch.dtype | None,
    config: PretrainedConfig,
    options: dict[str, Any],
    files: QuantizedFiles | None,
) -> PreTrainedModel:
    """files: of a checkpoint that is quantized; the config says nothing of that any more."""
    kind = auto_class(config)
    if kind is AutoModel:
        options = {**options, **without_pooler(MODEL_MAPPING[type(config)])}
    opened = nullcontext() if dtype in (None, config.dtype) else _opened_by(_unmapped)
    if files is not None:
        options = {**options, "config": config, "use_safetensors": True}
        opened = _opened_by(files.open)
    with opened:
        # weights_only is said though it is the default: unpickling anything else runs its code.
        model, report = kind.from_pretrained(
            name,
            dtype=dtype or "auto",
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    if missing or mismatched:
        raise ModelLoadError(
            f"checkpoint {name} does not fit its config: missing weights {missing[:5]}, wrong "
            f"shapes {mismatched[:5]}; transformers would fill them with random numbers"
        )
    if report["unexpected_keys"]:
        unused = sorted(report["unexpected_keys"])
        logger.warning("checkpoint %s has weights that its config has no use for: %s", name, unused)
    return model.eval()


def _unmapped(*args: Any, **kwargs: Any) -> Any:
    """Read tensors from a file instead of mapping it.

    Mapped pages stay as long as the file is open: after a conversion to another dtype the whole
    checkpoint would lie in memory beside its copy.
    """
    return safe_open(*args, **{**kwargs, "backend": "pread"})


@contextmanager
def _opened_by(opener: Callable[..., Any]) -> Iterator[None]:
    """Let transformers open safetensors files with this."""
    with _patching:
        before, modeling_utils.safe_open = modeling_utils.safe_open, opener
        try:
            yield
        finally:
            modeling_utils.safe_open = before


def load_tokenizer(name: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """The tokenizer of a directory or hub id; None where there is none.

    Raises ModelLoadError where a directory's tokenizer files cannot be read.
    """
    place = resolve(name)
    files = {file.name for glob in TOKENIZER_FILES for file in Path(place).glob(glob)}
    if Path(place).is_dir() and not files:
        return None
    try:
        return AutoTokenizer.from_pretrained(place, **_hub_options(place, trust_remote_code))
    except Exception as error:  # tokenizers raises bare Exceptions
        if files:
            raise ModelLoadError(
                f"the tokenizer in {place} ({', '.join(sorted(files))}) cannot be read: {error}"
            ) from error
        logger.warning("there is no tokenizer at %s: %s", place, str(error).splitlines()[0])
        return None


def load_pooling(model: PreTrainedModel) -> dict[str, Any]:
    """How sentence-transformers pools this checkpoint's hidden states, {} where it does not say."""
    place = model.name_or_path
    if not place:
        return {}
    try:
        file = cached_file(
            place,
            POOLING_FILE,
            local_files_only=_hub_options(place, False)["local_files_only"],
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return {} if file is None else json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:  # of a model in memory, whose directory may be gone
        logger.info("%s of %s is not read: %s", POOLING_FILE, place, error)
        return {}


def _given_tokenizer(tokenizer: Any) -> Any:
    """What a user gave as tokenizer, loaded where it is a name."""
    if isinstance(tokenizer, str | os.PathLike):
        place, tokenizer = tokenizer, load_tokenizer(tokenizer)
        if tokenizer is None:
            raise OptionError(f"there is no tokenizer at tokenizer={str(place)!r}")
    if not hasattr(tokenizer, "save_pretrained"):
        raise OptionError(
            "tokenizer must be a transformers tokenizer, a directory or a hub id, got "
            f"{type(tokenizer).__name__}"
        )
    return tokenizer


def _converted(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of another dtype over converted copies; the model itself where it has it."""
    if model.dtype == dtype and all(p.dtype == dtype for p in model.parameters()):
        return model
    shell = share_tensors(model, REFERENCE, dtype).eval()
    if hasattr(model, "generation_config"):
        shell.generation_config = model.generation_config
    done: dict[int, torch.nn.Parameter] = {}
    for module in shell.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in done:
                    done[id(parameter)] = torch.nn.Parameter(parameter.to(dtype), False)
                module._parameters[name] = done[id(parameter)]
        # RoPE of some types writes into its own.
        module._buffers.update({n: b.clone() for n, b in module._buffers.items() if b is not None})
    return shell
