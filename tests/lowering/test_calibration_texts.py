"""Texts in every form as token ids; what is wrong is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.errors import OptionError
from inlay.lowering.calibration_texts import calibration_samples
from inlay.lowering.loading import load_tokenizer
from inlay.lowering.quantization import packed_batches
from inlay.passes.quantize.config import QuantizationConfig

BOS = 1
IDS = {"token_ids": list(range(2, 202))}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("demo")


def samples(
    texts: Any, tokenizer: Any = None, max_seq_len: int = 2048, **options: int
) -> list[list[int]]:
    config = QuantizationConfig(format="w4a16", method="gptq", calibration=texts, **options)
    return calibration_samples(config, tokenizer, 4096, max_seq_len)


def lines(path: Path, *items: Any) -> str:
    path.write_text("\n".join(i if isinstance(i, str) else json.dumps(i) for i in items))
    return str(path)


def test_each_text_gives_its_first_piece_then_its_second(tokenizer: Any) -> None:
    texts = ["a b c " * 100, "def " * 200, "import " * 30]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    got = samples(iter(texts), tokenizer, num_samples=5, sample_length=33)
    assert [piece[0] for piece in got] == [BOS] * 5
    expected = [plain[0][:32], plain[1][:32], plain[2][:32], plain[0][32:64], plain[1][32:64]]
    assert [piece[1:] for piece in got] == expected
    assert samples(texts, tokenizer, num_samples=5, sample_length=33) == got
    assert samples(texts, tokenizer, 33, num_samples=5) == got


def test_an_endless_iterable_is_read_as_far_as_needed(tokenizer: Any) -> None:
    def endless() -> Any:
        while True:
            yield "The with statement is used to wrap the execution of a block. " * 3

    assert len(samples(endless(), tokenizer, num_samples=9)) == 9


def test_lines_of_every_form(tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    items = {"text": "A list is a sequence. " * 20}, {"messages": messages}, IDS
    path = lines(tmp_path / "texts.jsonl", *items[:2], "", items[2])
    got = samples(path, tokenizer)
    assert got == samples(items, tokenizer)
    assert got[0] == tokenizer.encode(items[0]["text"])
    assert got[1] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert got[2] == IDS["token_ids"]
    # What the artifact keeps gives the same again.
    kept = lines(tmp_path / "kept.jsonl", *({"token_ids": piece} for piece in got))
    assert samples(kept) == got


def test_a_plain_text_is_taken_from_all_over(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(1000)))
    got = samples(str(path), tokenizer, num_samples=4, sample_length=40)
    text = [tokenizer.decode(piece, skip_special_tokens=True) for piece in got]
    assert "line 0 of" in text[0]
    assert "line 75" in text[3]
    assert [len(piece) for piece in got] == [40] * 4


WRONG = {
    "not JSON": ("{text: 1}", r'line 2: not JSON .*a line must be \{"text'),
    "a list": ("[1, 2]", r"line 2: a line must be .*got '\[1, 2\]'"),
    "no key": ({"prompt": "a"}, r"line 2: must be a text or one of .*got \"\{'prompt"),
    "two keys": ({"text": "a", "token_ids": [1]}, r"line 2: must be a text or one of"),
    "text": ({"text": 5}, r'line 2: "text" must be a string, got 5'),
    "ids": ({"token_ids": [5, 4096]}, r"line 2: \"token_ids\" must be .* 0 to 4095, got \[5, 4096"),
    "bool": ({"token_ids": [True]}, "line 2: .*got .True"),
    "roles": (
        {"messages": [{"role": "cook", "content": "a"}]},
        "line 2: the chat template refused the messages: role must be system",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lines_are_named(name: str, tokenizer: Any, tmp_path: Path) -> None:
    line, message = WRONG[name]
    with pytest.raises(OptionError, match=message):
        samples(lines(tmp_path / "texts.jsonl", IDS, line), tokenizer)


def test_what_cannot_be_calibrated_on(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"missing.jsonl' cannot be read: .*No such file"):
        samples(str(tmp_path / "missing.jsonl"))
    (tmp_path / "latin").write_bytes(b"\xe9\xe8")
    with pytest.raises(OptionError, match="latin' cannot be read: 'utf-8' codec"):
        samples(str(tmp_path / "latin"))
    with pytest.raises(OptionError, match=r"at least 128 tokens, calibration gives 3 in 1 texts"):
        samples(["a b"], tokenizer)
    with pytest.raises(OptionError, match=r"gives 20 in 2 texts \(num_samples=2, sample_length=10"):
        samples([IDS, IDS, IDS], num_samples=2, sample_length=10)
    with pytest.raises(OptionError, match=r"calibration\[1\]: texts need a tokenizer, .* has none"):
        samples([IDS, "text"])
    with pytest.raises(OptionError, match=r"calibration\[0\]: must be a text or one of .*got '5'"):
        samples([5], tokenizer)
    for wrong in (5, {"text": "a"}, b"text"):
        with pytest.raises(OptionError, match="calibration must be a file, or an iterable"):
            samples(wrong, tokenizer)


def test_samples_are_packed_as_requests() -> None:
    batches = packed_batches([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]], 5)
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[1, 2, 3, 4, 5]],
        [[6, 7, 8, 9, 10]],
    ]
    assert [batch["position_ids"].tolist() for batch in batches] == [
        [[0, 1, 2, 0, 1]],
        [[0, 1, 2, 3, 0]],
    ]
