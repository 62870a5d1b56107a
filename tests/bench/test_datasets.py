"""Workloads of `inlay bench`: lengths, shared beginnings, files, and what is refused."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlay.bench.datasets import (
    Lengths,
    Request,
    add_arguments,
    make_requests,
    parse_lengths,
    workload_of,
)
from inlay.errors import OptionError
from tests.runtime.toy_tokenizers import byte_level

VOCAB_SIZE = 300


def requests(
    *flags: str, most: int | None = 4096, tokenizer: Any = None, vocab_size: int = VOCAB_SIZE
) -> list[Request]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    workload = workload_of(parser.parse_args(flags))
    return make_requests(workload, vocab_size, most, tokenizer)


def test_lengths() -> None:
    generator = np.random.default_rng(0)
    assert parse_lengths("x", "7").draw(generator, 3) == [7, 7, 7]
    uniform = parse_lengths("x", "3-5").draw(generator, 200)
    assert set(uniform) == {3, 4, 5}
    # Means of 20,000 draws: 0.1 is 14 (normal) and 4.7 (lognormal) standard errors away from 100.
    for kind, spread in (("normal", 10), ("lognormal", 30)):
        drawn = parse_lengths("x", f"{kind}:100,{spread}").draw(generator, 20_000)
        assert np.mean(drawn) == pytest.approx(100, abs=1)
        assert np.std(drawn) == pytest.approx(spread, rel=0.05)
    assert min(parse_lengths("x", "normal:1,50").draw(generator, 100)) == 1
    assert Lengths("fixed", 10).around(0.25) == Lengths("uniform", 7, 13)
    for wrong in (
        *("0", "-3", "5-3", "0-3", "many", "1.5", "9" * 20, "1-" + "9" * 20, "zipf:5,1", ""),
        *("normal:5", "normal:0,1", "normal:1.2.3,1", "normal:5,-1", "lognormal:9999999999,1"),
    ):
        with pytest.raises(OptionError, match=r"--input-len must be N, LOW-HIGH"):
            parse_lengths("--input-len", wrong)


def test_random_requests_are_the_same_for_a_seed() -> None:
    flags = ["--num-prompts", "20", "--input-len", "5-40", "--output-len", "8"]
    given = requests(*flags)
    assert len(given) == 20
    assert {one.max_tokens for one in given} == {8}
    assert len({len(one.token_ids) for one in given}) > 5
    assert all(0 < token < VOCAB_SIZE for one in given for token in one.token_ids)
    assert given == requests(*flags)
    assert given != requests(*flags, "--seed", "1")
    near = requests("--num-prompts", "50", "--input-len", "100", "--random-range-ratio", "0.1")
    lengths = [len(one.token_ids) for one in near]
    assert 90 <= min(lengths) < 95 < 105 < max(lengths) <= 110


def test_shared_beginnings() -> None:
    given = requests("--dataset", "prefix", "--num-prompts", "10", "--prefix-len", "12",
                     "--num-prefixes", "3", "--input-len", "5")  # fmt: skip
    beginnings = [tuple(one.token_ids[:12]) for one in given]
    assert sorted(beginnings.count(one) for one in set(beginnings)) == [3, 3, 4]
    assert len({tuple(one.token_ids[12:]) for one in given}) == 10
    assert {len(one.token_ids) for one in given} == {17}
    assert len({tuple(one.token_ids[:1]) for one in requests("--num-prompts", "20")}) > 10


def write(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return str(path)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(byte_level())  # others use it without a template
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "ab", "max_tokens": 3},
        "",
        {"messages": [{"role": "user", "content": "cd"}], "id": "x"},
        {"prompt_token_ids": [5, 6], "max_tokens": 1},
        {"input_ids": [7], "output_tokens": 2, "task_id": 9},
    )
    size = len(tokenizer)
    given = requests("--dataset", file, "--output-len", "11", tokenizer=tokenizer, vocab_size=size)
    assert given == [
        Request(tokenizer("ab")["input_ids"], 3),
        Request(tokenizer("cd")["input_ids"], 11),
        Request([5, 6], 1),
        Request([7], 2),
    ]
    few = requests("--dataset", file, "--num-prompts", "1", tokenizer=tokenizer, vocab_size=size)
    assert few == given[:1]
    with pytest.raises(OptionError, match="holds 4 requests, and --num-prompts is 5"):
        requests("--dataset", file, "--num-prompts", "5", tokenizer=tokenizer, vocab_size=size)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ([1], "must be an object"),
        ({"max_tokens": 3}, "must have one of prompt"),
        ({"prompt": "a", "messages": []}, "must have one of prompt"),
        ({"prompt_token_ids": [1], "max_token": 3}, "got prompt_token_ids, max_token"),
        ({"prompt_token_ids": [1], "max_tokens": 1, "output_tokens": 1}, "at most one of"),
        ({"prompt_token_ids": [1], "max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"prompt_token_ids": [1], "max_tokens": True}, "max_tokens must be an integer"),
        ({"prompt_token_ids": [VOCAB_SIZE]}, r"all in 0\.\.299"),
        ({"prompt_token_ids": [True]}, "token id"),
        ({"prompt_token_ids": ["a"]}, "token id"),
        ({"prompt_token_ids": []}, "at least one token id"),
        ({"prompt_token_ids": [1] * 99, "max_tokens": 2}, "has 101 tokens with its output"),
        ({"prompt": "text"}, "a text prompt needs a tokenizer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat needs a tokenizer"),
    ],
)
def test_a_wrong_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt_token_ids": [1], "max_tokens": 1}, "", line)
    with pytest.raises(OptionError, match=rf"wrong lines: line 3: .*{message}"):
        requests("--dataset", file, most=100)


def test_many_wrong_lines(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"line 5: .*; and 2 more"):
        requests("--dataset", write(tmp_path / "x.jsonl", *["{"] * 7))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "sharegpt"], "must be random, prefix or a file"),
        (["--dataset", "/"], "must be random, prefix or a file"),
        (["--num-prompts", "0"], "--num-prompts must be 1 to"),
        (["--num-prompts", "10000000000"], "--num-prompts must be 1 to"),
        (["--num-prompts", "1000000"], "more than 100000000 tokens in all"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--random-range-ratio", "1"], r"--random-range-ratio must be in \[0, 1\)"),
        (["--random-range-ratio", "0.1", "--input-len", "3-4"], "plain numbers with it"),
        (["--prefix-len", "5"], "--prefix-len is for --dataset prefix"),
        (["--dataset", "prefix", "--num-prefixes", "0"], "--num-prefixes is for"),
        (["--input-len", "4090"], "4154 tokens, prompt and output together, and the model takes"),
        (["--input-len", "999999999"], "and the model takes 4096"),
        (["--input-len", "normal:1e30,1"], "must be N, LOW-HIGH"),
        (["--output-len", "lognormal:9999,1"], "and the model takes 4096"),
        (["--dataset", "prefix", "--prefix-len", "4000"], "lower --input-len"),
    ],
)
def test_what_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        requests(*flags)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_an_empty_or_unreadable_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(OptionError, match=r"holds 0 requests|cannot be read"):
        requests("--dataset", str(file))
