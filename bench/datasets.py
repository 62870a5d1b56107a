"""Workloads: prompts and output lengths, drawn at random or read from a file, always the same.

--dataset random    random token ids; lengths by --input-len and --output-len
--dataset prefix    the same behind --num-prefixes common beginnings of --prefix-len tokens
--dataset FILE      JSON lines: {"prompt" | "messages" | "prompt_token_ids": ..., "max_tokens"}
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inlay.errors import InlayError, OptionError
from inlay.prompts import encode_prompt, render_chat

MAX_PROMPTS, MAX_TOKENS = 1_000_000, 100_000_000
"""Of a workload made at random, which lies in memory."""

DEFAULT_PROMPTS = 32
MAX_LENGTH = 10**9
FORMS = "N, LOW-HIGH (uniform), normal:MEAN,STD or lognormal:MEAN,STD"
PROMPTS = {
    "prompt": "prompt",
    "messages": "messages",
    "prompt_token_ids": "prompt_token_ids",
    "input_ids": "prompt_token_ids",
}
"""What a line may hold as its prompt, TensorRT-LLM's name too, and what it is here."""
LENGTHS = ("max_tokens", "output_tokens")
IGNORED = ("id", "task_id")


@dataclass(frozen=True)
class Request:
    """One prompt and how many tokens to generate for it."""

    token_ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of whole numbers from 1 on; mean and spread are of the numbers themselves."""

    kind: str
    first: float
    second: float = 0.0

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        if self.kind == "fixed":
            values: Any = np.full(count, self.first)
        elif self.kind == "uniform":
            values = generator.integers(int(self.first), int(self.second) + 1, count)
        elif self.kind == "normal":
            values = generator.normal(self.first, self.second, count)
        else:
            variance = math.log1p((self.second / self.first) ** 2)
            middle = math.log(self.first) - variance / 2
            values = generator.lognormal(middle, math.sqrt(variance), count)
        return np.clip(np.rint(values), 1, 2**62).astype(np.int64).tolist()

    def around(self, ratio: float) -> Lengths:
        """Uniform within length * (1 -+ ratio), as vLLM's --random-range-ratio."""
        low, high = (round(self.first * factor, 6) for factor in (1 - ratio, 1 + ratio))
        return Lengths("uniform", max(math.floor(low), 1), math.ceil(high))


def parse_lengths(flag: str, text: str) -> Lengths:
    """See FORMS. Raises OptionError."""
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high <= MAX_LENGTH:
            return Lengths("uniform", low, high) if match[2] else Lengths("fixed", low)
    if match := re.fullmatch(r"(normal|lognormal):([\d.]+),([\d.]+)", text):
        try:
            mean, spread = float(match[2]), float(match[3])
        except ValueError:
            mean = spread = 0.0
        if 1 <= mean <= MAX_LENGTH and 0 <= spread <= MAX_LENGTH:
            return Lengths(match[1], mean, spread)
    raise OptionError(f"{flag} must be {FORMS}, of 1 to {MAX_LENGTH} tokens; got {text!r}")


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Flags of a workload; vLLM's names, where it has them, beside ours."""
    add = parser.add_argument
    add("--dataset", "--dataset-name", default="random", metavar="NAME|FILE",
        help="random (default), prefix, or a file of JSON lines")  # fmt: skip
    add("--num-prompts", "--num-requests", type=int, metavar="N",
        help=f"requests ({DEFAULT_PROMPTS}; of a file: all)")  # fmt: skip
    add("--input-len", "--random-input-len", "--prefix-repetition-suffix-len", default="128",
        metavar="LENGTHS", help=f"prompt tokens (128): {FORMS}")  # fmt: skip
    add("--output-len", "--random-output-len", "--prefix-repetition-output-len", default="64",
        metavar="LENGTHS", help="output tokens (64), likewise; of a file: where a line has no "
        "max_tokens")  # fmt: skip
    add("--random-range-ratio", type=float, metavar="R", help="for lengths N: uniform within "
        "N * (1 -+ R), 0 <= R < 1")  # fmt: skip
    add("--prefix-len", "--prefix-repetition-prefix-len", type=int, metavar="N",
        help="tokens of a common beginning, with --dataset prefix (256)")  # fmt: skip
    add("--num-prefixes", "--prefix-repetition-num-prefixes", type=int, metavar="N",
        help="different beginnings, with --dataset prefix (4)")  # fmt: skip
    add("--seed", type=int, default=0, help="of lengths, ids and arrivals (0)")


@dataclass(frozen=True)
class Workload:
    """What to run, checked as far as can be without a model."""

    dataset: str
    num_prompts: int | None
    input_len: Lengths
    output_len: Lengths
    prefix_len: int
    num_prefixes: int
    seed: int

    @property
    def is_file(self) -> bool:
        return self.dataset not in ("random", "prefix")


def workload_of(arguments: argparse.Namespace) -> Workload:
    """Raises OptionError."""
    name, count, ratio = arguments.dataset, arguments.num_prompts, arguments.random_range_ratio
    if name not in ("random", "prefix") and not Path(name).is_file():
        raise OptionError(
            f"--dataset must be random, prefix or a file of JSON lines; there is no file {name!r}"
        )
    if count is not None and not 1 <= count <= MAX_PROMPTS:
        raise OptionError(f"--num-prompts must be 1 to {MAX_PROMPTS}, got {count}")
    if arguments.seed < 0:
        raise OptionError(f"--seed must be at least 0, got {arguments.seed}")
    lengths = [
        parse_lengths("--input-len", arguments.input_len),
        parse_lengths("--output-len", arguments.output_len),
    ]
    if ratio is not None:
        if not 0 <= ratio < 1 or any(one.kind != "fixed" for one in lengths):
            raise OptionError(
                "--random-range-ratio must be in [0, 1), and lengths plain numbers with it; got "
                f"{ratio} with {arguments.input_len} and {arguments.output_len}"
            )
        lengths = [one.around(ratio) for one in lengths]
    prefix = {"prefix_len": arguments.prefix_len, "num_prefixes": arguments.num_prefixes}
    for key, value in prefix.items():
        flag = f"--{key.replace('_', '-')}"
        if value is not None and (value < 1 or name != "prefix"):
            raise OptionError(f"{flag} is for --dataset prefix and at least 1; got {value}")
    return Workload(
        dataset=name,
        num_prompts=count,
        input_len=lengths[0],
        output_len=lengths[1],
        prefix_len=(prefix["prefix_len"] or 256) if name == "prefix" else 0,
        num_prefixes=prefix["num_prefixes"] or 4,
        seed=arguments.seed,
    )


def make_requests(
    workload: Workload, vocab_size: int, max_seq_len: int | None, tokenizer: Any
) -> list[Request]:
    """The requests, each checked against the model's limits.

    Raises OptionError for the first random length, or all lines of a file, that do not fit.
    """
    if workload.is_file:
        return _read(workload, vocab_size, max_seq_len, tokenizer)
    count = workload.num_prompts or DEFAULT_PROMPTS
    generator = np.random.default_rng(workload.seed)
    inputs = workload.input_len.draw(generator, count)
    outputs = workload.output_len.draw(generator, count)
    longest = max(one + two for one, two in zip(inputs, outputs, strict=True)) + workload.prefix_len
    if max_seq_len is not None and longest > max_seq_len:
        raise OptionError(
            f"a request would have {longest} tokens, prompt and output together, and the model "
            f"takes {max_seq_len}: lower --input-len, --output-len or --prefix-len"
        )
    if sum(inputs) + count * workload.prefix_len > MAX_TOKENS:
        raise OptionError(
            f"the prompts would have more than {MAX_TOKENS} tokens in all: lower --num-prompts"
        )

    def ids(length: int) -> list[int]:
        return generator.integers(1, vocab_size, length).tolist()

    beginnings = [ids(workload.prefix_len) for _ in range(workload.num_prefixes)]
    order = generator.permutation(count) % workload.num_prefixes
    return [
        Request([*beginnings[group], *ids(num_input)], num_output)
        for group, num_input, num_output in zip(order, inputs, outputs, strict=True)
    ]


def _read(
    workload: Workload, vocab_size: int, max_seq_len: int | None, tokenizer: Any
) -> list[Request]:
    path, found, wrong = Path(workload.dataset), list[Request](), list[str]()
    generator = np.random.default_rng(workload.seed)
    for number, text in _lines(path):
        (length,) = workload.output_len.draw(generator, 1)
        try:
            request = _parse(text, length, tokenizer)
            _check(request, vocab_size, max_seq_len)
            found.append(request)
        except (InlayError, ValueError) as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise OptionError(f"--dataset {path} has wrong lines: {'; '.join(wrong[:5])}{more}")
    if len(found) < (workload.num_prompts or 1):
        wanted = workload.num_prompts or "at least 1"
        raise OptionError(
            f"--dataset {path} holds {len(found)} requests, and --num-prompts is {wanted}"
        )
    return found[: workload.num_prompts]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers from 1 and texts of a file's lines that are not empty."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--dataset {path} cannot be read: {error}") from error
    for number, text in enumerate(content.split("\n"), 1):
        if text.strip():
            yield number, text


def _parse(text: str, default_length: int, tokenizer: Any) -> Request:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"no JSON: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"must be an object; got {text[:80]!r}")
    prompts = [name for name in PROMPTS if name in content]
    lengths = [name for name in LENGTHS if name in content]
    unknown = sorted(set(content) - {*PROMPTS, *LENGTHS, *IGNORED})
    if len(prompts) != 1 or len(lengths) > 1 or unknown:
        raise OptionError(
            f"must have one of {', '.join(PROMPTS)}, at most one of {', '.join(LENGTHS)}, and "
            f"{' or '.join(IGNORED)}; got {', '.join(content) or 'nothing'}"
        )
    length = content[lengths[0]] if lengths else default_length
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise OptionError(f"{lengths[0]} must be an integer of at least 1; got {length!r}")
    item, name = content[prompts[0]], PROMPTS[prompts[0]]
    if name == "messages":
        return Request(list(render_chat(item, tokenizer).token_ids), length)
    return Request(list(encode_prompt({name: item}, tokenizer).token_ids), length)


def _check(request: Request, vocab_size: int, max_seq_len: int | None) -> None:
    ids = request.token_ids
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
    if wrong or not ids:
        raise OptionError(
            f"must have at least one token id, all in 0..{vocab_size - 1}; got {(wrong or ids)[:5]}"
        )
    total = len(ids) + request.max_tokens
    if max_seq_len is not None and total > max_seq_len:
        raise OptionError(f"has {total} tokens with its output, and the model takes {max_seq_len}")
