"""What `LLM.embed` and `LLM.score` ask for and give back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from inlay.errors import OptionError, RequestError
from inlay.runtime.output_state import OutputState
from inlay.runtime.outputs import EmbeddingOutput, EmbeddingRequestOutput, ScoreOutput
from inlay.runtime.sampling_params import SamplingParams

Pooling = Literal["last", "mean", "cls"]

EMBED_PARAMS = SamplingParams(temperature=0, max_tokens=1)
SCORE_PARAMS = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
"""Both run the prompt only; the token behind it is a by-product."""

MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""The fields of sentence-transformers' 1_Pooling/config.json, and what we call them."""


def default_pooling(config: Mapping[str, Any], is_encoder: bool) -> Pooling:
    """What the checkpoint was trained for.

    config: its 1_Pooling/config.json, {} where it has none: then encoders take the mean, as
        sentence-transformers does, and decoders the last token, the only one that saw them all.
    Raises OptionError for a pooling that is not built.
    """
    asked = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
    if not asked:
        return "mean" if is_encoder else "last"
    if len(asked) > 1 or asked[0] not in MODES:
        raise OptionError(
            f"the checkpoint's 1_Pooling/config.json asks for {', '.join(asked)}; built are"
            f" {', '.join(MODES)}, one at a time: give pooling="
        )
    return MODES[asked[0]]


def embedding_of(state: OutputState) -> EmbeddingRequestOutput:
    """The output of a finished request that asked for an embedding."""
    return EmbeddingRequestOutput(
        request_id=state.request_id,
        prompt=state.prompt,
        prompt_token_ids=state.prompt_token_ids,
        outputs=EmbeddingOutput(list(state.embedding or ())),
        finished=True,
        metrics=state.metrics,
        error=_why_not(state, state.embedding is not None),
    )


def score_of(state: OutputState) -> ScoreOutput:
    """The output of a finished request that asked for its prompt's log probabilities."""
    logprobs: list[float | None] = []
    error = _why_not(state, len(state.prompt_logprobs) == len(state.prompt_token_ids))
    if error is None:
        pairs = zip(state.prompt_token_ids, state.prompt_logprobs, strict=False)
        logprobs = [None if places is None else places[i].logprob for i, places in pairs]
    return ScoreOutput(
        request_id=state.request_id,
        prompt=state.prompt,
        prompt_token_ids=state.prompt_token_ids,
        logprobs=logprobs,
        metrics=state.metrics,
        error=error,
    )


def _why_not(state: OutputState, is_whole: bool) -> BaseException | None:
    """What a request failed of; one that was ended early has no error of its own."""
    if state.error is not None or is_whole:
        return state.error
    reason = state.sequences[0].finish_reason
    return RequestError(f"the request ended too early for a result: finish_reason {reason!r}")
