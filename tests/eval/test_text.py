"""Texts become windows that judge each token once."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from inlay.errors import OptionError
from inlay.eval.text import Text, cut, read_text, tokenize, window_sizes
from inlay.lowering.loading import load_tokenizer


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 8), (2, 1), (100, 50)])
@pytest.mark.parametrize("length", [2, 3, 9, 41])
def test_each_token_is_judged_once_with_all_the_context_there_is(
    bos: int | None, window: int, stride: int, length: int
) -> None:
    ids = list(range(100, 100 + length))
    windows = cut(bos, ids, window, stride)
    judged = [token for one in windows for token in one.targets]
    assert judged == (ids if bos is not None else ids[1:])
    for one in windows:
        assert 1 <= one.num_judged <= min(stride, len(one.token_ids))
        row = [*one.token_ids, one.targets[-1]]
        assert row[-one.num_judged :] == list(one.targets)
        head = [] if bos is None else [bos]
        assert row[: len(head)] == head
        text = row[len(head) :]
        assert text == list(range(text[0], text[0] + len(text)))
        # As long as the text before it or the window allow.
        assert len(one.token_ids) == window or text[0] == ids[0]
        assert len(one.token_ids) <= window


def test_the_shipped_text_is_long_enough_and_frozen() -> None:
    text = read_text(None)
    bos, ids = tokenize(text, load_tokenizer("demo"), None)
    assert bos == 1
    assert len(ids) >= 100_000
    assert text.sha256.startswith("d83a4c76af03")  # another text makes verdicts incomparable


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"good \xff\xfe bad", "not UTF-8: byte 0xff at offset 5"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(OptionError, match=message):
        read_text(file)


def test_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be read.*No such file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(OptionError, match="cannot be read"):
        read_text(tmp_path / "cut.txt.gz")


def test_one_token_is_too_few() -> None:
    with pytest.raises(OptionError, match="has 1 tokens, and at least 2"):
        tokenize(Text("tiny", "a"), load_tokenizer("demo"), None)


def test_sizes_of_windows() -> None:
    assert window_sizes(None, None, 2048) == (1024, 512)
    assert window_sizes(None, None, 100) == (100, 50)
    assert window_sizes(64, 64, 2048) == (64, 64)
    with pytest.raises(OptionError, match="max_seq_len, 2048, got 4096"):
        window_sizes(4096, None, 2048)
    with pytest.raises(OptionError, match="stride must be at most the window, 64 tokens, got 65"):
        window_sizes(64, 65, 2048)
