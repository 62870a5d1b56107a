"""The text that models are judged on, cut into windows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.errors import OptionError
from inlay.lowering.loading import demo_path

HELD_OUT = ("heldout.txt", "heldout_c.txt.gz")
"""Beside the demo model: Python's documentation that it has not read, see its README."""

LONGEST_WINDOW = 1024
"""Unless another is asked for: the demo model was trained on rows of so many tokens, and of a
longer context little is left to gain for a comparison."""


@dataclass(frozen=True)
class Text:
    """A text, what to call it, and the sha256 of its UTF-8 bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Window:
    """A piece of a text as a model gets it: token_ids [n], of which the last m, `num_judged`, each
    predict the one behind them; so targets [m] are the last m - 1 of token_ids and one more."""

    token_ids: Sequence[int]
    targets: Sequence[int]

    @property
    def num_judged(self) -> int:
        return len(self.targets)


def read_text(path: str | os.PathLike[str] | None) -> Text:
    """A UTF-8 file, or the held-out text that ships with the demo model.

    Raises OptionError where it cannot be read, is empty, or is no UTF-8.
    """
    if path is None:
        parts = [_read(demo_path() / name) for name in HELD_OUT]
        return Text("Python's documentation, held out", "\n\n".join(parts))
    text = Text(str(path), _read(Path(path)))
    if not text.content.strip():
        raise OptionError(f"text {path} is empty; give a file with text in it")
    return text


def _read(file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8")
    except (OSError, EOFError) as error:
        raise OptionError(f"text {file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"text {file} is not UTF-8: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; convert it, with `iconv -t utf-8` for one"
        ) from error


def tokenize(text: Text, tokenizer: Any, max_tokens: int | None) -> tuple[int | None, list[int]]:
    """The token that the tokenizer begins texts with (None where it has none), and the text's own.

    Raises OptionError where there are fewer than two tokens.
    """
    whole = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    begins = len(whole) > len(plain) and whole[0] == tokenizer.bos_token_id
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise OptionError(
            f"text {text.name} has {len(ids)} tokens, and at least 2 are needed: each but the "
            "first is predicted from those before it"
        )
    return (tokenizer.bos_token_id if begins else None), ids[:max_tokens]


def window_sizes(window: int | None, stride: int | None, max_seq_len: int) -> tuple[int, int]:
    """(window, stride) in tokens; OptionError where they do not fit each other or the engine."""
    size = min(max_seq_len, LONGEST_WINDOW) if window is None else window
    if size > max_seq_len:
        raise OptionError(
            f"window must be at most the engine's max_seq_len, {max_seq_len}, got {size}"
        )
    step = max(size // 2, 1) if stride is None else stride
    if step > size:
        raise OptionError(f"stride must be at most the window, {size} tokens, got {step}")
    return size, step


def cut(bos: int | None, ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """Each token of the text is judged once, `stride` of them in a window, with as many tokens
    before it as a window holds; the very first only where bos stands before it.

    The sliding windows of https://huggingface.co/docs/transformers/perplexity.
    """
    head = [] if bos is None else [bos]
    windows = []
    for begin in range(1 - len(head), len(ids), stride):
        end = min(begin + stride, len(ids))
        start = max(end - 1 - (window - len(head)), 0)
        row = [*head, *ids[start:end]]
        windows.append(Window(row[:-1], ids[begin:end]))
    return windows
