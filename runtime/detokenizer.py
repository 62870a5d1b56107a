"""Token ids to text, a token at a time: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from inlay.runtime.token_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the beginning of a character to."""

MAX_HELD_TOKENS = 4
"""Tokens that one character may be spread over: UTF-8 has at most four bytes."""


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that skip_special_tokens leaves out; worth keeping, it takes a while."""
    return frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)


class Detokenizer(Protocol):
    """Text that grows as tokens come: its pieces are whole characters and add up to the whole."""

    def append(self, token_ids: Sequence[int]) -> str:
        """New whole characters that these tokens complete."""

    def flush(self) -> str:
        """What was held back as incomplete, now that no more tokens come."""


class DetokenizerFactory:
    """Makes the detokenizers of a tokenizer's requests; looks at the tokenizer once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = special_token_ids(tokenizer)
        self._bytes_of = token_bytes(tokenizer)

    def make(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """The detokenizer of one sequence that continues a prompt."""
        skipped = self._special if skip_special_tokens else frozenset()
        if self._bytes_of is None:
            return WindowDetokenizer(self._tokenizer, prompt_token_ids, skipped)
        return ByteDetokenizer(self._bytes_of, prompt_token_ids, skipped)

    def text_of(self, token_id: int) -> str:
        """One token by itself; special tokens too, and bytes that are no character as U+FFFD."""
        return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)


class ByteDetokenizer:
    """Each token is so many bytes; characters come out as soon as their last byte is there.

    The pieces add up to all bytes decoded at once, U+FFFD for what is no UTF-8. That is what
    tokenizer.decode() gives; only among fallback bytes (<0x0A>) that are no UTF-8 it gives up
    their valid neighbours too, which may have been shown long ago.
    """

    def __init__(
        self,
        bytes_of: TokenBytes,
        prompt_token_ids: Sequence[int] = (),
        skipped_ids: frozenset[int] = frozenset(),
    ) -> None:
        """skipped_ids: tokens that have no text, see special_token_ids."""
        self._bytes_of = bytes_of
        self._skipped = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Tokenizers that drop a text's leading space are to see that this is no beginning.
        self._is_first = all(i in skipped_ids for i in prompt_token_ids[-1:])
        self._num_stripped = bytes_of.num_stripped if self._is_first else 0

    def append(self, token_ids: Sequence[int]) -> str:
        """New whole characters that these tokens complete."""
        return "".join(self._append(i) for i in token_ids if i not in self._skipped)

    def flush(self) -> str:
        """What was held back as incomplete, now that no more tokens come."""
        return self._decoder.decode(b"", final=True)

    def _append(self, token_id: int) -> str:
        data = self._bytes_of(token_id, self._is_first)
        if data is None:
            return ""
        self._is_first = False
        while data and self._num_stripped:
            self._num_stripped = self._num_stripped - 1 if data.startswith(b" ") else 0
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)


class WindowDetokenizer:
    """For tokenizers that tell only texts of whole lists of tokens.

    A window of the last tokens is decoded with and without the new ones, and the difference is new
    text (as in vLLM and Hugging Face's TGI). tokenizers' DecodeStream does the same, but keeps
    bytes that are no text back until text follows, which may be never.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int] = (),
        skipped_ids: frozenset[int] = frozenset(),
    ) -> None:
        """skipped_ids: tokens that have no text, see special_token_ids."""
        self._tokenizer = tokenizer
        self._skipped = skipped_ids
        # A token of context tells tokenizers that drop a leading space that this is no beginning.
        context = [i for i in prompt_token_ids[-1:] if i not in skipped_ids]
        if self._decode(context).endswith(INCOMPLETE):
            context = []
        self._window = context
        self._num_read = len(context)

    def append(self, token_ids: Sequence[int]) -> str:
        """New whole characters that these tokens complete."""
        text = ""
        for token_id in token_ids:
            if token_id not in self._skipped:
                self._window.append(token_id)
                text += self._read()
        return text

    def flush(self) -> str:
        """What was held back as incomplete, now that no more tokens come."""
        before, after = self._decode(self._window[: self._num_read]), self._decode(self._window)
        self._num_read = len(self._window)
        return after[len(before) :]

    def _read(self) -> str:
        before, after = self._decode(self._window[: self._num_read]), self._decode(self._window)
        if after.endswith(INCOMPLETE):
            end = self._last_boundary(after)
            if end <= self._num_read:
                return ""
            after = self._decode(self._window[:end])
        else:
            end = len(self._window)
        # The tokens just read become the context of the next ones.
        self._window = self._window[self._num_read :]
        self._num_read = end - self._num_read
        return after[len(before) :]

    def _last_boundary(self, text: str) -> int:
        """How many tokens of the window are certainly whole characters, though its end is not.

        More tokens than a character needs are bytes that will never be text. A place where the
        two sides decode to the same as the whole cuts no character.
        """
        size = len(self._window)
        if size - self._num_read > MAX_HELD_TOKENS:
            for end in range(size - 1, self._num_read, -1):
                if self._decode(self._window[:end]) + self._decode(self._window[end:]) == text:
                    return end
        return self._num_read

    def _decode(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)


class StopStringMatcher:
    """Finds stop strings in growing text and keeps back what may become one.

    The match that is complete first wins, and among those the longest: the result does not
    depend on how the text was cut into tokens.
    """

    def __init__(self, stop_strings: Sequence[str], include_in_output: bool = False) -> None:
        self._stop_strings = stop_strings
        self._include = include_in_output
        self._longest = max(map(len, stop_strings), default=0)
        self._begin = 0
        self.text = ""
        self.stop_reason: str | None = None

    def skip(self, new_text: str) -> None:
        """Add text in which no stop string counts."""
        self.text += new_text
        self._begin = len(self.text)

    def append(self, new_text: str) -> bool:
        """Add text; True if a stop string was completed, and `text` ends with or before it."""
        start = max(len(self.text) - self._longest + 1, self._begin)
        self.text += new_text
        found = []
        for stop in self._stop_strings:
            if (index := self.text.find(stop, start)) >= 0:
                found.append((index + len(stop), index, stop))
        if not found:
            return False
        end, index, self.stop_reason = min(found)
        self.text = self.text[: end if self._include else index]
        return True

    @property
    def num_held(self) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        if self.stop_reason is not None:
            return 0
        return max((_overlap(self.text, stop) for stop in self._stop_strings), default=0)


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that is a beginning of stop, but not all of it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
