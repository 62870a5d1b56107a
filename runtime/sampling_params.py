"""How one request wants its tokens chosen and when it wants to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from inlay.errors import RequestError

MAX_TEMPERATURE = 1e6
"""Beyond it logits are all alike in float32: tokens would be drawn uniformly."""

MAX_PENALTY = 1e6
"""Of repetition: a logit times this is still finite in float32."""

MAX_LOGPROBS = 20
"""Likeliest tokens that may be asked for."""

MAX_BIAS = 1e6
"""Enough to force a token or to keep it away; allowed_token_ids and bad_words_ids do so wholly."""

MAX_SEQUENCES = 64
"""Of one request, side by side: n, best_of and beam width."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing logits by them would overflow float32."""


Processor = Callable[..., Any]
"""(prompt_token_ids, output_token_ids, logits [vocab]) -> logits."""


ELSEWHERE = {
    "guided_decoding": "guided decoding is not built yet",
    "structured_outputs": "guided decoding is not built yet",
    "guided_json": "guided decoding is not built yet",
    "guided_regex": "guided decoding is not built yet",
    "max_new_tokens": "it is max_tokens here",
    "min_new_tokens": "it is min_tokens here",
    "end_id": "give stop_token_ids, or LLM(eos_token_ids=...)",
    "pad_id": "nothing is padded",
    "beam_width": "give use_beam_search=True and best_of",
    "num_beams": "give use_beam_search=True and best_of",
    "do_sample": "temperature=0 is greedy",
    "detokenize": "give prompts of token ids and read token_ids",
    "truncate_prompt_tokens": "cut the prompt's token ids",
    "output_kind": "generate_async(streaming=True) gives growing outputs, each with its delta",
    "return_context_logits": "give prompt_logprobs",
    "return_generation_logits": "give logprobs",
    "lora_request": "LoRA is not built yet",
}
"""Parameters of other engines, and what there is here instead."""


class _RefusesUnknown(type):
    """Calls a class with its own fields only; RequestError names another one."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        allowed = vars(cls)["__dataclass_fields__"]
        for name in given:
            if name not in allowed:
                instead = ELSEWHERE.get(name, f"it has {', '.join(allowed)}")
                raise RequestError(f"{cls.__name__} has no parameter {name!r}: {instead}")
        return super().__call__(*args, **given)


@dataclass(frozen=True, kw_only=True)
class SamplingParams(metaclass=_RefusesUnknown):
    """Sampling and stopping rules of one request; names and defaults are vLLM's.

    n: how many sequences to give back, 1 to 64. Greedy ones would all be equal and are refused.
    best_of: how many to generate, n to 64; the n with the highest probability are given back. None
        is n.
    use_beam_search: search the likeliest sequences as Hugging Face does with num_beams and without
        sampling (TensorRT-LLM's name); the beam width is best_of or n, at least 2. temperature
        stays at 1 or 0, which are the same then, and truncation and logprobs off.
    length_penalty: beams are ranked by their log probability over their length to this power.
    early_stopping: whether beams end as soon as there are enough: True; False goes on while the
        best one could do better at its length; "never" while it could at any length.
    temperature: 0 is greedy (the first of equal maxima); otherwise logits are divided by it.
    top_p: keep the most likely tokens until their probability reaches this, in (0, 1].
    top_k: keep the k most likely tokens; 0 or -1 keeps all. top_k comes before top_p, and tokens
        as likely as the last one kept stay too.
    min_p: keep tokens at least this many times as likely as the likeliest, in [0, 1]; 0 is off.
        It comes before top_k.
    typical_p: keep the tokens whose information is nearest to the distribution's entropy until
        their probability reaches this, in (0, 1]; 1 is off (Meister et al., 2022). It
        comes after min_p and before top_k.
    repetition_penalty: logits of tokens in prompt or output are divided by this where positive and
        multiplied where negative; 1 is off (Keskar et al., 2019).
    presence_penalty: taken from the logits of tokens that are in the output; 0 is off.
    frequency_penalty: taken from them for each time that they are in it; 0 is off.
    no_repeat_ngram_size: no n-gram of this length comes twice, the prompt's included; 0 is off.
    logit_bias: {token id: what is added to its logit}, kept as pairs.
    allowed_token_ids: no other token comes.
    bad_words: strings that must not come.
    bad_words_ids: lists of token ids that must not come one after the other.
    min_tokens: end-of-sequence and stop tokens must not come before so many, and stop strings do
        not count in their text.
    seed: the same seed gives the same tokens in any batch; None draws one at arrival.
    stop: strings that end the request; they are cut from the text.
    stop_token_ids: token ids that end the request, besides the model's end-of-sequence ids.
    max_tokens: most tokens to generate; None goes on to the engine's max_seq_len.
    logprobs: give the log probability of each token and of so many likeliest ones, 0 to 20.
    prompt_logprobs: the same for the prompt's tokens.
    logits_processors: the user's own, called in this order after all of the above but temperature
        and truncation: "module:Class", "module:Class:{JSON arguments}" or {"class":
        "module:Class", "args": {...}} (kept as a string), or callables, for an engine that runs in
        this process. `processors.py` has the contract.
    ignore_eos: go on after an end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    include_stop_str_in_output: keep the stop string or the stop token's text in the text.

    Raises RequestError where a value is not allowed.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processors: Sequence[str | Mapping[str, Any] | Processor] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        """Validate, and turn the lists into tuples that nobody can change afterwards."""
        for name, (kind, is_allowed, text) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            is_kind = _is_int(value) if kind is int else _is_real(value)
            _require(is_kind and is_allowed(value), name, text, value)
            # numpy's scalars are welcome, but not to be met with later.
            object.__setattr__(self, name, kind(value))
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
            self.min_tokens,
        )
        for name in _BOOLS:
            _require(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        for name, frozen in self._frozen().items():
            object.__setattr__(self, name, frozen)
        self._check_sequences()

    def _check_sequences(self) -> None:
        """What n, best_of and beam search allow beside them."""
        early = self.early_stopping
        good = isinstance(early, bool) or early == "never"
        _require(good, "early_stopping", 'True, False or "never"', early)
        good = self.best_of is None or self.best_of >= self.n
        _require(good, "best_of", f"None or at least n ({self.n})", self.best_of)
        if not self.use_beam_search:
            for name, off in (("length_penalty", 1.0), ("early_stopping", False)):
                value = getattr(self, name)
                _require(value == off, name, f"{off} unless use_beam_search=True", value)
            good = self.num_sequences == 1 or not self.is_greedy
            allowed = (
                f"at least {GREEDY_BELOW:g} where n or best_of > 1: greedy sequences are equal"
            )
            _require(good, "temperature", f"{allowed} (or use_beam_search=True)", self.temperature)
            return
        _require(
            self.num_sequences > 1, "best_of", "2 or more (or n), the beam width", self.best_of
        )
        for name, allowed_values in _WITH_BEAMS.items():
            value, texts = getattr(self, name), " or ".join(map(repr, allowed_values))
            _require(value in allowed_values, name, f"{texts} with use_beam_search=True", value)

    def _frozen(self) -> dict[str, Any]:
        """The lists as tuples, checked."""
        only, words = self.allowed_token_ids, self.bad_words_ids
        if only is not None:
            only = _as_token_ids("allowed_token_ids", only)
            _require(bool(only), "allowed_token_ids", "None or a list that is not empty", only)
        words = words if words is not None else ()
        _require(
            isinstance(words, list | tuple) and all(words),
            "bad_words_ids",
            "a list of lists of token ids, none of them empty",
            words,
        )
        return {
            "stop": _as_strings("stop", self.stop),
            "stop_token_ids": _as_token_ids("stop_token_ids", self.stop_token_ids),
            "logit_bias": _as_bias(self.logit_bias),
            "allowed_token_ids": only,
            "bad_words": _as_strings("bad_words", self.bad_words),
            "bad_words_ids": tuple(_as_token_ids("bad_words_ids", word) for word in words),
            "logits_processors": _as_processors(self.logits_processors),
        }

    @property
    def processors(self) -> tuple[str | Processor, ...]:
        """`logits_processors`, as callables and strings only."""
        return _as_processors(self.logits_processors)

    @property
    def num_sequences(self) -> int:
        """How many sequences run side by side: best_of or n; the beam width."""
        return self.n if self.best_of is None else self.best_of

    @property
    def needs_cumulative_logprob(self) -> bool:
        """Whether sequences are ranked by their probability."""
        return self.num_sequences > self.n and not self.use_beam_search

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that came before change the logits."""
        off = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return off != (1.0, 0.0, 0.0)

    @property
    def edits_logits(self) -> bool:
        """Whether logits change before a token is chosen; users' own processors apart."""
        bans = self.bad_words_ids or self.no_repeat_ngram_size or self.min_tokens
        only = self.allowed_token_ids is not None
        return bool(self.has_penalties or self.logit_bias or bans or only)

    @property
    def bias(self) -> dict[int, float]:
        """`logit_bias`, always as a dict."""
        return dict(_as_bias(self.logit_bias))

    @property
    def named_token_ids(self) -> dict[str, tuple[int, ...]]:
        """All token ids in these parameters, by parameter, to be held against a vocabulary."""
        return {
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "allowed_token_ids": tuple(self.allowed_token_ids or ()),
            "logit_bias": tuple(self.bias),
            "bad_words_ids": tuple(i for word in self.bad_words_ids or () for i in word),
        }

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return _as_strings("stop", self.stop)


_WITH_BEAMS: dict[str, tuple[Any, ...]] = {
    "temperature": (1, 0),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "logprobs": (None,),
    "stop": ((),),
}
_BOOLS = (
    "use_beam_search",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "n": (int, lambda x: 1 <= x <= MAX_SEQUENCES, f"an integer from 1 to {MAX_SEQUENCES}"),
    "best_of": (
        int,
        lambda x: 1 <= x <= MAX_SEQUENCES,
        f"None or an integer from n to {MAX_SEQUENCES}",
    ),
    "length_penalty": (float, lambda x: -10 <= x <= 10, "a number in [-10, 10] (1 is usual)"),
    "temperature": (
        float,
        lambda x: 0 <= x <= MAX_TEMPERATURE,
        f"a number from 0 (greedy) to {MAX_TEMPERATURE:g}",
    ),
    "top_p": (float, lambda x: 0 < x <= 1, "a number in (0, 1] (1 is off)"),
    "top_k": (int, lambda x: -1 <= x < 2**31, "an integer in [1, 2**31), or 0 or -1 for off"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number in [0, 1] (0 is off)"),
    "typical_p": (float, lambda x: 0 < x <= 1, "a number in (0, 1] (1 is off)"),
    "repetition_penalty": (
        float,
        lambda x: 0 < x <= MAX_PENALTY,
        f"a number in (0, {MAX_PENALTY:g}] (1 is off)",
    ),
    "presence_penalty": (float, lambda x: -2 <= x <= 2, "a number in [-2, 2] (0 is off)"),
    "frequency_penalty": (float, lambda x: -2 <= x <= 2, "a number in [-2, 2] (0 is off)"),
    "no_repeat_ngram_size": (int, lambda x: 0 <= x < 2**31, "an integer >= 0"),
    "seed": (int, lambda x: 0 <= x < 2**64, "None or an integer in [0, 2**64)"),
    "min_tokens": (int, lambda x: 0 <= x < 2**31, "an integer >= 0"),
    "max_tokens": (int, lambda x: 1 <= x < 2**63, "None or an integer in [1, 2**63)"),
    "logprobs": (
        int,
        lambda x: 0 <= x <= MAX_LOGPROBS,
        f"None or an integer from 0 to {MAX_LOGPROBS}",
    ),
    "prompt_logprobs": (
        int,
        lambda x: 0 <= x <= MAX_LOGPROBS,
        f"None or an integer from 0 to {MAX_LOGPROBS}",
    ),
}
_OPTIONAL = ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs")


def _as_strings(name: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else given if given is not None else ()
    _require(
        isinstance(strings, list | tuple) and all(isinstance(s, str) and s for s in strings),
        name,
        "a string or a list of strings, none of them empty",
        given,
    )
    return tuple(strings)


def _as_token_ids(name: str, ids: Sequence[int] | None) -> tuple[int, ...]:
    given = ids if ids is not None else ()
    _require(
        isinstance(given, list | tuple) and all(_is_int(i) and i >= 0 for i in given),
        name,
        "a list of token ids >= 0",
        ids,
    )
    return tuple(int(i) for i in given)


def _as_bias(
    bias: Mapping[int, float] | Sequence[tuple[int, float]] | None,
) -> tuple[tuple[int, float], ...]:
    given = bias if bias is not None else ()
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    _require(
        isinstance(pairs, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs)
        and all(_is_int(i) and i >= 0 and _is_real(v) and abs(v) <= MAX_BIAS for i, v in pairs),
        "logit_bias",
        f"{{token id: number from -{MAX_BIAS:g} to {MAX_BIAS:g}}}",
        bias,
    )
    return tuple((int(i), float(v)) for i, v in pairs)


_NAMED = re.compile(r"[\w.]+:[\w.]+(:\{.*\})?", re.DOTALL)
_PROCESSORS = (
    'a list of "module:Class", "module:Class:{JSON}", {"class": "module:Class", "args": {JSON}} or'
    " callables"
)


def _as_processors(
    given: Sequence[str | Mapping[str, Any] | Processor] | None,
) -> tuple[str | Processor, ...]:
    entries = given if given is not None else ()
    _require(isinstance(entries, list | tuple), "logits_processors", _PROCESSORS, given)
    return tuple(_as_processor(entry) for entry in entries)


def _as_processor(entry: Any) -> str | Processor:
    """Mappings become strings too: plain, hashable, and the same on the other side of a pipe."""
    named = entry
    if isinstance(entry, Mapping) and entry.keys() <= {"class", "args"}:
        try:
            named = f"{entry['class']}:{json.dumps(entry.get('args', {}))}"
        except (KeyError, TypeError, ValueError):
            named = None
    good = callable(named) or (isinstance(named, str) and bool(_NAMED.fullmatch(named)))
    _require(good, "logits_processors", _PROCESSORS, entry)
    return named


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(valid: bool, name: str, allowed: str, given: object) -> None:
    if not valid:
        raise RequestError(f"SamplingParams.{name} must be {allowed}; given {given!r}")
