"""The whole of `inlay eval`: read, run engines beside their reference, judge, note the verdict."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

import inlay
from inlay.engine import Engine
from inlay.errors import OptionError, UnsupportedModelError
from inlay.eval.evaluation import Evaluation, Setting, summarize
from inlay.eval.greedy import PROMPT_TOKENS, GreedyMatch, cut_prompts, greedy_match
from inlay.eval.measure import PagedRows, measure
from inlay.eval.options import EvalOptions, default_limit
from inlay.eval.reference import Origin, Reference
from inlay.eval.store import store
from inlay.eval.text import cut, read_text, tokenize, window_sizes
from inlay.lowering.loading import load_tokenizer
from inlay.passes.quantize.config import NONE

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

IN_MEMORY = "MODEL"
"""The origin of engines that were made of a model in memory, see `lowering.loading.Source`."""

SAME_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Fields of the config that an engine shares with its reference."""


def evaluate(
    engine: Engine,
    *,
    text: str | os.PathLike[str] | None = None,
    reference: Any = None,
    tokenizer: Any = None,
    progress: Progress = logger.info,
    **options: Any,
) -> Evaluation:
    """Judge an engine against Hugging Face in float32 on a text, and note the verdict beside it.

    >>> evaluate(Engine.load("llama-w8a8"), text="wiki.txt").increase
    Interval(value=0.0031, low=0.0024, high=0.0038)

    text: a UTF-8 file; None is the held-out text that ships with the demo model. reference: the
    checkpoint, as a directory, a hub id or a model in memory; None is what the engine was made of.
    tokenizer: where not the engine's own, one or where to load it from. options: the fields of
    `EvalOptions`. progress: called with a line of text now and then.

    Raises:
        OptionError: the text cannot be read, the reference is another model, there is no
            tokenizer, a wrong value.
        ModelLoadError: the reference cannot be loaded.
        UnsupportedModelError: the engine is an encoder.
    """
    chosen = EvalOptions(**options)
    (found,) = evaluate_all(
        [engine],
        text=text,
        reference=reference,
        tokenizer=tokenizer,
        options=chosen,
        progress=progress,
    )
    return found


def evaluate_all(
    engines: Sequence[Engine],
    *,
    text: str | os.PathLike[str] | None,
    reference: Any,
    options: EvalOptions,
    progress: Progress,
    tokenizer: Any = None,
) -> list[Evaluation]:
    """`evaluate` for several engines of one checkpoint, which is run once for all of them."""
    _check_decoders(engines)
    limits = [_limit(engine, options) for engine in engines]
    content, origin = read_text(text), origin_of(engines, reference)
    words = _tokenizer(engines, tokenizer)
    max_seq_len = min(engine.manifest["limits"]["max_seq_len"] for engine in engines)
    window, stride = window_sizes(options.window, options.stride, max_seq_len)
    bos, ids = tokenize(content, words, options.max_tokens)
    windows = cut(bos, ids, window, stride)
    truth = origin.load(max_seq_len)
    for engine in engines:
        check_reference(engine, truth)
    judged = sum(one.num_judged for one in windows)
    progress(
        f"{judged} tokens of {content.name} (sha256 {content.sha256[:12]}) in {len(windows)} "
        f"windows of up to {window} tokens; reference: {truth.name} in float32 "
        f"(sha256 {truth.sha256[:12]})"
    )
    models = [engine.load_model() for engine in engines]
    longest = max(len(one.token_ids) for one in windows)
    paged = [PagedRows(model, longest, options.kv_cache_dtype) for model in models]
    scores = measure(paged, truth, windows, _tell(progress))
    evaluations = []
    for engine, model, score, limit in zip(engines, models, scores, limits, strict=True):
        setting = Setting(
            backend=engine.backend,
            dtype=engine.manifest["dtype"],
            quantization=quantization_of(engine),
            kv_cache_dtype=options.kv_cache_dtype,
            reference=truth.name,
            reference_sha256=truth.sha256,
            text=content.name,
            text_sha256=content.sha256,
            window=window,
            stride=stride,
            num_tokens=judged,
            num_windows=len(windows),
            made_with=(
                f"inlay {inlay.__version__}, torch {torch.__version__}, transformers "
                f"{transformers.__version__}"
            ),
        )
        greedy = _greedy(model, truth, bos, ids, max_seq_len, options)
        evaluation = summarize(setting, score, greedy, limit)
        store(engine, evaluation)
        evaluations.append(evaluation)
    return evaluations


def quantization_of(engine: Engine) -> str | None:
    """What the engine was quantized by, as `inlay build` takes it; None where it was not."""
    word: str = engine.manifest["options"].get("quantization", NONE)
    return None if word == NONE else word


def origin_of(engines: Sequence[Engine], reference: Any) -> Origin:
    """Where the reference of these engines comes from: what the user said, else their manifests.

    Raises OptionError where neither names one, or the engines have different ones.
    """
    trusted = any(engine.manifest["options"].get("trust_remote_code") for engine in engines)
    if reference is not None:
        return Origin(reference, trusted)
    names = {engine.manifest.get("origin", IN_MEMORY) for engine in engines}
    if len(names) > 1:
        raise OptionError(
            f"these engines were made of different models, {', '.join(sorted(names))}: judge them "
            "one by one"
        )
    name = names.pop()
    if name == IN_MEMORY:
        raise OptionError(
            f"engine {engines[0].path} does not say what checkpoint it was made of; name it with "
            "reference (--reference DIR)"
        )
    return Origin(name, trusted)


def check_reference(engine: Engine, reference: Reference) -> None:
    """Raises OptionError where the reference is clearly another model than the engine's."""
    config = type(reference.config).from_dict(dict(engine.model_config))
    ours, theirs = config.get_text_config(), reference.config.get_text_config()
    same_type = engine.model_config.get("model_type") == reference.config.model_type
    for name in SAME_MODEL:
        mine, other = getattr(ours, name, None), getattr(theirs, name, None)
        if mine != other or not same_type:
            mine = mine if same_type else engine.model_config.get("model_type")
            raise OptionError(
                f"the engine {engine.path} is of another model than the reference "
                f"{reference.name}: its {name} is {mine}, the reference's {other}; give the "
                "checkpoint that it was made of"
            )


def _check_decoders(engines: Sequence[Engine]) -> None:
    for engine in engines:
        if engine.is_encoder:
            raise UnsupportedModelError(
                f"engine {engine.path} is an encoder: it predicts no tokens, so it has no "
                "perplexity; `inlay build` compares an encoder's hidden states with Hugging Face's"
            )


def _tokenizer(engines: Sequence[Engine], given: Any) -> Any:
    """The one that was given, else the engines' own; OptionError where there is none."""
    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    places = [given] if given is not None else engines
    for place in places:
        found = place.tokenizer() if isinstance(place, Engine) else load_tokenizer(place)
        if found is not None:
            return found
    raise OptionError(
        f"there is no tokenizer at {given or engines[0].path}, and text needs one: name it with "
        "tokenizer (--tokenizer DIR)"
    )


def _limit(engine: Engine, options: EvalOptions) -> float:
    if options.limit is not None:
        return float(options.limit)
    return default_limit(quantization_of(engine), engine.manifest["dtype"], options.kv_cache_dtype)


def _greedy(
    model: Any,
    reference: Reference,
    bos: int | None,
    ids: Sequence[int],
    max_seq_len: int,
    options: EvalOptions,
) -> GreedyMatch | None:
    length = min(PROMPT_TOKENS, max_seq_len - options.num_greedy_tokens)
    if options.num_prompts == 0:
        return None
    if length < 2:
        raise OptionError(
            f"num_greedy_tokens must leave room for a prompt in max_seq_len, {max_seq_len}, got "
            f"{options.num_greedy_tokens}"
        )
    prompts = cut_prompts(bos, ids, options.num_prompts, length)
    return greedy_match(
        model, reference, prompts, options.num_greedy_tokens, options.kv_cache_dtype
    )


def _tell(progress: Progress) -> Callable[[int, int], None]:
    """A line for each tenth of the windows."""

    def tell(done: int, count: int) -> None:
        if done * 10 // count > (done - 1) * 10 // count:
            progress(f"{done} of {count} windows")

    return tell
