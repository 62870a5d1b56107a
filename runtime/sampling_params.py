"""How one request wants its tokens chosen and when it wants to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from inlay.errors import RequestError

MAX_TEMPERATURE = 1e6
"""Beyond it logits are all alike in float32: tokens would be drawn uniformly."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping rules of one request; names and defaults are vLLM's.

    temperature: 0 is greedy (the first of equal maxima); otherwise logits are divided by it.
    top_p: keep the most likely tokens until their probability reaches this, in (0, 1].
    top_k: keep the k most likely tokens; 0 or -1 keeps all. top_k comes before top_p, and tokens
        as likely as the last one kept stay too.
    seed: the same seed gives the same tokens in any batch; None draws one at arrival.
    stop: strings that end the request; they are cut from the text.
    stop_token_ids: token ids that end the request, besides the model's end-of-sequence ids.
    max_tokens: most tokens to generate; None goes on to the engine's max_seq_len.
    ignore_eos: go on after an end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    include_stop_str_in_output: keep the stop string or the stop token's text in the text.

    Raises RequestError where a value is not allowed.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Validate, and turn the lists into tuples that nobody can change afterwards."""
        _require(
            _is_real(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
            "temperature",
            f"a number from 0 (greedy) to {MAX_TEMPERATURE:g}",
            self.temperature,
        )
        _require(
            _is_real(self.top_p) and 0 < self.top_p <= 1,
            "top_p",
            "a number in (0, 1] (1 is off)",
            self.top_p,
        )
        _require(
            _is_int(self.top_k) and -1 <= self.top_k < 2**31,
            "top_k",
            "an integer in [1, 2**31), or 0 or -1 for off",
            self.top_k,
        )
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**64),
            "seed",
            "None or an integer in [0, 2**64)",
            self.seed,
        )
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            "None or an integer >= 1",
            self.max_tokens,
        )
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        # numpy's scalars are welcome, but not to be met with later.
        for name, kind in (("temperature", float), ("top_p", float), ("top_k", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("seed", "max_tokens"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))
        object.__setattr__(self, "stop", _as_stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_token_ids(self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return _as_stop_strings(self.stop)


def _as_stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop if stop is not None else ()
    _require(
        isinstance(strings, list | tuple) and all(isinstance(s, str) and s for s in strings),
        "stop",
        "a string or a list of strings, none of them empty",
        stop,
    )
    return tuple(strings)


def _as_token_ids(ids: Sequence[int] | None) -> tuple[int, ...]:
    given = ids if ids is not None else ()
    _require(
        isinstance(given, list | tuple) and all(_is_int(i) and i >= 0 for i in given),
        "stop_token_ids",
        "a list of token ids >= 0",
        ids,
    )
    return tuple(int(i) for i in given)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(valid: bool, name: str, allowed: str, given: object) -> None:
    if not valid:
        raise RequestError(f"SamplingParams.{name} must be {allowed}; given {given!r}")
