"""Calibration's texts as token ids: from a file, or from whatever Python iterates over."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from inlay.errors import OptionError
from inlay.passes.quantize.config import QuantizationConfig

JSON_LINES = (".jsonl", ".ndjson", ".json")
MIN_TOKENS = 128
"""Fewer measure nothing: GPTQ's and AWQ's layers would be fitted to them alone."""

FORMS = '{"text": "..."}, {"messages": [...]} or {"token_ids": [...]}'


def calibration_samples(
    config: QuantizationConfig, tokenizer: Any, vocab_size: int, max_seq_len: int
) -> list[list[int]]:
    """At most num_samples lists of at most sample_length token ids, the same for the same texts.

    config.calibration: a file of lines like FORMS (.jsonl, .ndjson, .json), a file of plain text,
    which is cut into num_samples parts, or an iterable of texts and of mappings like those lines.
    The first num_samples texts are taken, from each its first piece of sample_length tokens; where
    that is fewer, then each text's second piece, and so on. Every piece begins as the tokenizer
    begins a text. Token ids are taken as they are.

    Raises OptionError, which names the line, for what is none of these, for text without a
    tokenizer, and where there are fewer than MIN_TOKENS in all.
    """
    length = min(config.sample_length, max_seq_len)
    encode = _Encoder(tokenizer, vocab_size, length)
    what, items = _items(config.calibration, config.num_samples)
    texts = [encode(where, item) for where, item in itertools.islice(items, config.num_samples)]
    rounds = itertools.zip_longest(*texts)
    pieces = [piece for one in rounds for piece in one if piece][: config.num_samples]
    if (total := sum(map(len, pieces))) < MIN_TOKENS:
        raise OptionError(
            f"calibration needs at least {MIN_TOKENS} tokens, {what} gives {total} in "
            f"{len(texts)} texts (num_samples={config.num_samples}, sample_length={length}); give "
            "more text, a few thousand tokens like those that the model will see"
        )
    return pieces


def _items(source: Any, num_parts: int) -> tuple[str, Iterator[tuple[str, Any]]]:
    """What the source is called, and its texts or mappings, each with the place it came from."""
    if not isinstance(source, str):
        if isinstance(source, bytes | Mapping) or not isinstance(source, Iterable):
            raise OptionError(
                "calibration must be a file, or an iterable of texts and of mappings like "
                f"{FORMS}, got {source!r}"
            )
        return "calibration", ((f"calibration[{i}]", item) for i, item in enumerate(source))
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise OptionError(f"calibration file {source!r} cannot be read: {error}") from None
    if Path(source).suffix in JSON_LINES:
        return source, _json_lines(source, text)
    size = max(-(-len(text) // num_parts), 1)
    parts = (text[begin : begin + size] for begin in range(0, len(text), size))
    return source, ((source, part) for part in parts if part.strip())


def _json_lines(file: str, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines, which also cuts at separators that JSON's strings may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise OptionError(f"{place}: not JSON ({error}); a line must be {FORMS}") from None
            if not isinstance(item, dict):
                raise OptionError(f"{place}: a line must be {FORMS}, got {line[:80]!r}")
            yield place, item


class _Encoder:
    """A text or mapping to its pieces of at most length token ids."""

    def __init__(self, tokenizer: Any, vocab_size: int, length: int) -> None:
        self._tokenizer, self._vocab_size, self._length = tokenizer, vocab_size, length
        self._opening: list[int] | None = None

    def __call__(self, where: str, item: Any) -> list[list[int]]:
        if isinstance(item, str):
            return self._text(where, item)
        keys = (
            [key for key in ("text", "messages", "token_ids") if key in item]
            if isinstance(item, Mapping)
            else []
        )
        if len(keys) != 1:
            raise OptionError(f"{where}: must be a text or one of {FORMS}, got {str(item)[:80]!r}")
        value = item[keys[0]]
        if keys == ["token_ids"]:
            return self._cut([], self._checked(where, value))
        return self._chat(where, value) if keys == ["messages"] else self._text(where, value)

    def _text(self, where: str, text: Any) -> list[list[int]]:
        if not isinstance(text, str):
            raise OptionError(f'{where}: "text" must be a string, got {text!r}')
        tokenizer = self._needed(where)
        if self._opening is None:
            self._opening = _opening(tokenizer)
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return self._cut(self._opening[: self._length - 1], ids)

    def _chat(self, where: str, messages: Any) -> list[list[int]]:
        tokenizer = self._needed(where)
        if getattr(tokenizer, "chat_template", None) is None:
            raise OptionError(
                f'{where}: "messages" need a chat template, and the tokenizer has none'
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise OptionError(
                f"{where}: the chat template refused the messages: {error}"
            ) from error
        # The template has written the special tokens already.
        return self._cut([], tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _needed(self, where: str) -> Any:
        if self._tokenizer is None:
            raise OptionError(
                f"{where}: texts need a tokenizer, and the model has none; give tokenizer=, or "
                'lines {"token_ids": [...]}'
            )
        return self._tokenizer

    def _checked(self, where: str, ids: Any) -> list[int]:
        is_ids = isinstance(ids, list) and all(type(i) is int for i in ids)
        if not is_ids or any(not 0 <= i < self._vocab_size for i in ids):
            raise OptionError(
                f'{where}: "token_ids" must be a list of integers from 0 to '
                f"{self._vocab_size - 1}, got {str(ids)[:80]}"
            )
        return ids

    def _cut(self, opening: list[int], ids: list[int]) -> list[list[int]]:
        size = self._length - len(opening)
        return [[*opening, *ids[begin : begin + size]] for begin in range(0, len(ids), size)]


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]
