"""What `LLM` was given: an engine, an artifact's directory, or a model to compile."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from inlay.aliases import translate
from inlay.backends.base import LoadedModel
from inlay.errors import OptionError, RequestError
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXECUTOR_OPTIONS = frozenset(field.name for field in fields(ExecutorConfig))
LOAD_OPTIONS = frozenset({"backend", "check_weights"})
BUILD_SIZES = frozenset({"max_num_tokens", "max_num_seqs", "max_seq_len"})
"""Options of both the build and the executor; where there is a build, it takes them."""


APPLIED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
"""Fields of a generation config, and what they are called in `SamplingParams`."""

NOT_APPLIED: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0,
    "penalty_alpha": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "sequence_bias": None,
}
"""Fields of a generation config that change the text and that we have no counterpart of, with the
value that changes nothing."""

logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What is needed of an engine; `inlay.Engine` is one."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The Hugging Face config."""

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The Hugging Face generation config, {} where there is none."""

    def load_model(self) -> LoadedModel:
        """Load code and weights."""

    def tokenizer(self) -> Any:
        """The tokenizer, None where there is none."""


def llm_options(
    options: Mapping[str, Any], *, seed: int | None, max_queue_size: int | None
) -> dict[str, Any]:
    """Options by our names; OptionError for what is refused, and for wrong values of LLM's own."""
    for name, value, least in (("seed", seed, 0), ("max_queue_size", max_queue_size, 1)):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_int and value >= least):
            raise OptionError(f"{name} must be None or an integer >= {least}; given {value!r}")
    return translate(options)


def pooling_config(engine: EngineLike) -> Mapping[str, Any]:
    """The checkpoint's 1_Pooling/config.json; {} where there is none."""
    return getattr(engine, "pooling_config", {})


def open_engine(
    model: Any, tokenizer: Any, options: Mapping[str, Any]
) -> tuple[EngineLike, PreTrainedTokenizerBase | None, ExecutorConfig]:
    """The engine, compiled where need be, its tokenizer, and how to run it.

    Raises OptionError for an option that has no meaning for this kind of model, or a bad value.
    """
    from inlay.engine import Engine, compile_model, is_artifact

    if isinstance(tokenizer, str | os.PathLike):
        from inlay.lowering.loading import load_tokenizer

        place, tokenizer = tokenizer, load_tokenizer(tokenizer)
        if tokenizer is None:
            raise OptionError(f"there is no tokenizer at tokenizer={str(place)!r}")
    if hasattr(model, "load_model"):
        config, _ = _split(options, EXECUTOR_OPTIONS, frozenset(), "an engine")
        engine = model
    elif is_artifact(model):
        config, rest = _split(options, EXECUTOR_OPTIONS, LOAD_OPTIONS, "an artifact")
        engine = Engine.load(model, **rest)
    else:
        config, rest = _split(options, EXECUTOR_OPTIONS - BUILD_SIZES, None, "a model")
        engine = compile_model(model, tokenizer=tokenizer, **rest)
    if tokenizer is None:
        tokenizer = engine.tokenizer()
    if not config.eos_token_ids:
        config = replace(config, eos_token_ids=eos_token_ids(engine, tokenizer))
    return engine, tokenizer, config


def eos_token_ids(engine: EngineLike, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Tokens that end a sequence: of the generation config, else the config, else the tokenizer."""
    for source in (engine.generation_config, engine.model_config):
        given = source.get("eos_token_id")
        if given is not None:
            return tuple(given) if isinstance(given, list | tuple) else (given,)
    given = getattr(tokenizer, "eos_token_id", None)
    return () if given is None else (given,)


def default_sampling(engine: EngineLike) -> SamplingParams:
    """What the model's generation config recommends; SamplingParams' defaults for the rest."""
    config = engine.generation_config
    given = {ours: config[name] for name, ours in APPLIED.items() if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    # A minimum without a maximum is no mistake of the model's: our default maximum gives way.
    least, most = given.get("min_tokens"), SamplingParams.max_tokens
    if "max_tokens" not in given and isinstance(least, int) and most is not None:
        given["max_tokens"] = max(least, most)
    given |= _beams(config, given)
    if unused := {
        n: v for n, v in config.items() if n in NOT_APPLIED and v not in (None, NOT_APPLIED[n])
    }:
        logger.warning("of the model's generation config this is not applied: %s", unused)
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise OptionError(f"the model's generation_config.json is wrong: {error}") from error


def _beams(config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Beam search, where the generation config asks for it; of the rest, what sampling alone has
    goes."""
    width = config.get("num_beams") or 1
    if width == 1:
        return {}
    if config.get("do_sample"):
        logger.warning("num_beams=%s with do_sample is not applied: it samples instead", width)
        return {}
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
        given.pop(name, None)
    logger.info("the model's generation config asks for a search with %s beams", width)
    beams = {"use_beam_search": True, "temperature": 0.0, "best_of": width}
    names = {"num_return_sequences": "n"} | {n: n for n in ("length_penalty", "early_stopping")}
    return beams | {ours: config[n] for n, ours in names.items() if config.get(n) is not None}


def _split(
    options: Mapping[str, Any],
    executor: frozenset[str],
    others: frozenset[str] | None,
    what: str,
) -> tuple[ExecutorConfig, dict[str, Any]]:
    """The executor's options, checked, and the rest; that may be anything where others is None."""
    rest = {name: value for name, value in options.items() if name not in executor}
    unknown = [] if others is None else sorted(set(rest) - others)
    if unknown:
        allowed = sorted(executor | (others or frozenset()))
        raise OptionError(
            f"LLM({what}, ...) knows no option {unknown[0]!r}; allowed: {', '.join(allowed)}."
            " What belongs to the build was settled when the engine was compiled"
        )
    return ExecutorConfig(**{n: v for n, v in options.items() if n in executor}), rest
