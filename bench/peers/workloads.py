"""What every system of a comparison is asked: the same token ids, at once, greedily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Request = dict[str, Any]
Answer = dict[str, Any]

NUM_REQUESTS = 32
DECODE_PROMPT, DECODE_TOKENS = 128, 96
PREFILL_PROMPT = 1024
LONGEST = 1280
"""Tokens of one request, prompt and output: what systems make room for."""
KV_TOKENS = 32768
"""Tokens of KV cache where a system asks for a size: more than all requests need at once."""


@dataclass(frozen=True)
class Workload:
    """title, unit: of its figure. figure: what an answer says, higher is better.
    warm_up: what is run once beforehand."""

    name: str
    title: str
    unit: str
    requests: tuple[Request, ...]
    warm_up: tuple[Request, ...]
    figure: Callable[[Workload, Answer], float]


def _offline_figure(workload: Workload, answer: Answer) -> float:
    return sum(r["max_tokens"] for r in workload.requests) / answer["total_s"]


def _decode_figure(workload: Workload, answer: Answer) -> float:
    """Tokens behind the first over the time behind it."""
    num_tokens = workload.requests[0]["max_tokens"] - 1
    return num_tokens / (answer["end_s"][0] - answer["first_token_s"][0])


def _prefill_figure(workload: Workload, answer: Answer) -> float:
    return len(workload.requests[0]["prompt_token_ids"]) / answer["first_token_s"][0]


def mixed_requests(vocab_size: int, num_requests: int = NUM_REQUESTS) -> tuple[Request, ...]:
    """Prompts of 32-512 tokens, 64-128 new ones; token 0 is some systems' padding and not used."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(num_requests):
        length = int(torch.randint(32, 513, (1,), generator=generator))
        num_new = int(torch.randint(64, 129, (1,), generator=generator))
        requests.append(_request(length, num_new, vocab_size, generator))
    return tuple(requests)


def _request(length: int, num_new: int, vocab_size: int, generator: torch.Generator) -> Request:
    ids = torch.randint(1, vocab_size, (length,), generator=generator).tolist()
    return {"prompt_token_ids": ids, "max_tokens": num_new}


def make_workloads(vocab_size: int) -> dict[str, Workload]:
    generator = torch.Generator().manual_seed(1)
    mixed = mixed_requests(vocab_size)
    single = (_request(DECODE_PROMPT, DECODE_TOKENS, vocab_size, generator),)
    long = (_request(PREFILL_PROMPT, 1, vocab_size, generator),)
    return {
        "offline": Workload(
            "offline",
            f"{NUM_REQUESTS} requests at once (prompts 32-512, 64-128 new tokens)",
            "output tokens/s",
            mixed,
            tuple({**request, "max_tokens": 8} for request in mixed[:8]),
            _offline_figure,
        ),
        "decode": Workload(
            "decode",
            f"decode, batch 1 (prompt {DECODE_PROMPT}, {DECODE_TOKENS} new tokens)",
            "tokens/s",
            single,
            ({**single[0], "max_tokens": 16},),
            _decode_figure,
        ),
        "prefill": Workload(
            "prefill",
            f"prefill of {PREFILL_PROMPT:,} tokens",
            "prompt tokens/s",
            long,
            long,
            _prefill_figure,
        ),
    }
