"""The bytes that a token stands for, for tokenizers whose decoder takes token after token.

Decoders of Hugging Face's tokenizers are described by JSON, and of those that language models use
each token's text depends on nothing but the token and on whether it is the text's first. What such
a description does not tell is left to `WindowDetokenizer`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BytesOf = Callable[[str, bool], bytes]
"""(a token as the vocabulary has it, whether it is the first) -> its bytes."""

NUM_SAMPLES = 64
"""Tokens of the vocabulary that are decoded both ways before a description is trusted."""

WORDPIECE_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What tokenizers' WordPiece decoder does to each token where cleanup is on, in its order."""


class TokenBytes:
    """Token ids to bytes, by the tokenizer's own description of its decoder.

    num_stripped: spaces that the decoder takes from the beginning of a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, bytes_of: BytesOf, num_stripped: int
    ) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = bytes_of
        self.num_stripped = num_stripped
        self._known: dict[tuple[int, bool], bytes | None] = {}

    def __call__(self, token_id: int, is_first: bool) -> bytes | None:
        """The token's bytes; None for an id that the vocabulary lacks, which has no text."""
        key = token_id, is_first
        if key not in self._known:
            token = self._tokenizer.convert_ids_to_tokens(token_id)
            self._known[key] = None if token is None else self._bytes_of(token, is_first)
        return self._known[key]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes | None:
    """How this tokenizer's tokens become bytes; None where its decoder is of no kind known here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    rule = _rule(json.loads(backend.decoder.__getstate__()))
    if rule is None:
        logger.info("decoder %s is decoded by a window of tokens", backend.decoder)
        return None
    found = TokenBytes(tokenizer, *rule)
    return found if _decodes_alike(tokenizer, found) else None


def _rule(decoder: dict[str, Any]) -> tuple[BytesOf, int] | None:
    """A decoder's description as a function of single tokens; None where it is no such function."""
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0
    if kinds == ["Metaspace"]:
        is_kept = steps[0]["prepend_scheme"] == "never"
        return partial(_metaspace, mark=steps[0]["replacement"], is_kept=is_kept), 0
    if kinds == ["WordPiece"]:
        prefix, cleanup = steps[0]["prefix"], steps[0]["cleanup"]
        return partial(_word_piece, prefix=prefix, cleanup=cleanup), 0
    return _sentence_piece_rule(steps, kinds)


def _sentence_piece_rule(
    steps: Sequence[dict[str, Any]], kinds: Sequence[str]
) -> tuple[BytesOf, int] | None:
    """Replacements, bytes as <0x0A>, all of it joined, and spaces taken from the beginning."""
    text = ",".join(kinds)
    if not re.fullmatch(r"(Replace,)*ByteFallback(,Fuse(,Strip)?)?", text):
        return None
    replaced = []
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            replaced.append((step["pattern"]["String"], step["content"]))
    num_stripped = 0
    if kinds[-1] == "Strip":
        if steps[-1]["content"] != " " or steps[-1]["stop"] != 0:
            return None
        num_stripped = steps[-1]["start"]
    return partial(_sentence_piece, replaced=replaced), num_stripped


def _byte_level(token: str, is_first: bool) -> bytes:
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:  # an added token, spelled as it is
        return token.encode()


def _metaspace(token: str, is_first: bool, mark: str, is_kept: bool) -> bytes:
    return token.replace(mark, "" if is_first and not is_kept else " ").encode()


def _word_piece(token: str, is_first: bool, prefix: str, cleanup: bool) -> bytes:
    if not is_first:
        is_inner = token.startswith(prefix)
        token = token[len(prefix) :] if is_inner else f" {token}"
    if cleanup:
        for old, new in WORDPIECE_CLEANUP:
            token = token.replace(old, new)
    return token.encode()


def _sentence_piece(token: str, is_first: bool, replaced: Sequence[tuple[str, str]]) -> bytes:
    for old, new in replaced:
        token = token.replace(old, new)
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.encode()


def _stand_ins() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: themselves where printable, else from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _stand_ins()


def _decodes_alike(tokenizer: PreTrainedTokenizerBase, found: TokenBytes) -> bool:
    """Whether a sample of the vocabulary, joined, is what the tokenizer decodes.

    A tokenizer may be of a class that decodes in a way of its own.
    """
    size = len(tokenizer)
    sample = range(0, size, max(1, size // NUM_SAMPLES))
    whole = [(i, found(i, False)) for i in sample]
    ids = [i for i, data in whole if data and _is_text(data)]
    joined = b"".join(found(i, place == 0) or b"" for place, i in enumerate(ids)).decode()
    for _ in range(found.num_stripped):
        joined = joined.removeprefix(" ")
    if joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False):
        return True
    logger.info("%s decodes in a way of its own: by a window of tokens", type(tokenizer).__name__)
    return False


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
