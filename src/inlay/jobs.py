"""Prompts, parameters and options of a call, made into requests that have passed every check."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

from inlay.errors import RequestError
from inlay.prompts import EncodedPrompt, check_unicode, encode_bad_words
from inlay.runtime.admission import Admission
from inlay.runtime.request import RequestOptions
from inlay.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
U = TypeVar("U")
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Job:
    """A prompt that has passed every check. text: None where token ids were given."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    options: RequestOptions


class JobMaker:
    """Checks at the door. Thread-safe.

    default_params: where a call gives none. seed: of the seeds of requests without one; None
        leaves those to chance.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        default_params: SamplingParams,
        seed: int | None,
    ) -> None:
        self.default_params = default_params
        self._tokenizer = tokenizer
        self._seeds = None if seed is None else random.Random(seed)
        # Tokenizers are not made for several threads.
        self._tokenizing = threading.Lock()
        if tokenizer is not None:
            # Turns off what truncation and padding a tokenizer was saved with: a change under the
            # hands of the thread that decodes.
            tokenizer.encode("a")

    def make(
        self,
        items: Sequence[Any],
        encode: Callable[[Any, PreTrainedTokenizerBase | None], EncodedPrompt],
        admission: Admission,
        params: Params,
        **options: Any,
    ) -> list[Job]:
        """The jobs of a call.

        encode: an item and the tokenizer to token ids. options: fields of RequestOptions, each one
            for all or a list of one for each. Raises RequestError, naming the first bad prompt.
        """
        every_params = self._params_for_each(params, len(items))
        jobs = []
        for index, one_options in enumerate(_options_for_each(options, len(items))):
            try:
                prompt = self.encode(items[index], encode)
                one = self.encode(every_params[index], encode_bad_words)
                checked = RequestOptions(**one_options)
                self._check_text(one)
                token_ids = admission.check(prompt.token_ids, one, checked)
            except RequestError as error:
                raise RequestError(f"prompt {index}: {error}") from error
            if self._seeds is not None and one.seed is None:
                one = replace(one, seed=self._seeds.getrandbits(64))
            jobs.append(Job(prompt.text, token_ids, one, checked))
        return jobs

    def encode(self, item: T, encode: Callable[[T, PreTrainedTokenizerBase | None], U]) -> U:
        """encode(item, the tokenizer), one thread at a time."""
        with self._tokenizing:
            return encode(item, self._tokenizer)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; RequestError for anything else, and without a tokenizer."""
        if not isinstance(text, str):
            raise RequestError(f"text must be a str; given {text!r}")
        check_unicode(text)
        with self._tokenizing:
            return self._require().encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; RequestError for anything else, and without a tokenizer."""
        is_list = isinstance(token_ids, Sequence) and not isinstance(token_ids, str | bytes)
        if not is_list or not all(isinstance(i, Integral) and 0 <= i < 2**31 for i in token_ids):
            raise RequestError(f"token_ids must be a list of token ids >= 0; given {token_ids!r}")
        return self._require().decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def _require(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise RequestError("there is no tokenizer: give LLM(tokenizer=...)")
        return self._tokenizer

    def _params_for_each(self, params: Params, count: int) -> Sequence[SamplingParams]:
        if params is None:
            return [self.default_params] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        if (
            not isinstance(params, list | tuple)
            or len(params) != count
            or not all(isinstance(one, SamplingParams) for one in params)
        ):
            raise RequestError(
                f"sampling_params must be a SamplingParams, or a list of {count} of them, one for"
                f" each prompt; given {params!r}"
            )
        return params

    def _check_text(self, params: SamplingParams) -> None:
        if params.stop_strings and self._tokenizer is None:
            raise RequestError(
                f"stop={list(params.stop_strings)!r} needs a tokenizer, and the engine has none:"
                " give LLM(tokenizer=...), or use stop_token_ids"
            )


def _options_for_each(options: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    for name, value in options.items():
        if isinstance(value, list | tuple) and len(value) != count:
            raise RequestError(
                f"{name} must be one for all prompts, or a list of {count}, one for each; given"
                f" {value!r}"
            )
    for index in range(count):
        yield {
            name: value[index] if isinstance(value, list | tuple) else value
            for name, value in options.items()
        }
