"""Token ids to text, a token at a time: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the beginning of a character to."""

MAX_HELD_TOKENS = 4
"""Tokens that one character may be spread over: UTF-8 has at most four bytes."""


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that skip_special_tokens leaves out; worth keeping, it takes a while."""
    return frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)


class Detokenizer:
    """Text that grows as tokens come.

    A tokenizer cannot decode tokens one by one: a character may be spread over several, and some
    put or drop a space depending on what stands before. So a window of the last tokens is decoded
    with and without the new ones, and the difference is new text (as in vLLM and Hugging Face's
    TGI). tokenizers' DecodeStream does the same, but keeps bytes that are no text back until text
    follows, which may be never.

    For byte-level tokenizers the pieces add up to tokenizer.decode() of all ids.
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

    def text_of(self, token_id: int) -> str:
        """One token by itself; special tokens too, and bytes that are no character as U+FFFD."""
        return self._decode([token_id])

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
        self.text = ""
        self.stop_reason: str | None = None

    def append(self, new_text: str) -> bool:
        """Add text; True if a stop string was completed, and `text` ends with or before it."""
        start = max(len(self.text) - self._longest + 1, 0)
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
