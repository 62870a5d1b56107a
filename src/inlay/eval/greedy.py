"""How far an engine's greedy text is the reference's: its decode steps, through the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.backends.base import LoadedModel
from inlay.eval.reference import Reference
from inlay.eval.text import Window
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams

PROMPT_TOKENS = 64
"""Of each prompt, where the text and the engine's max_seq_len allow it."""


@dataclass(frozen=True)
class GreedyMatch:
    """Tokens from the first on that were the reference's greedy choice, for num_prompts prompts.

    mean_length: of num_tokens at the most. num_whole: prompts whose tokens all were.
    """

    num_prompts: int
    num_tokens: int
    mean_length: float
    num_whole: int


def cut_prompts(
    bos: int | None, ids: Sequence[int], num_prompts: int, length: int
) -> list[list[int]]:
    """Prompts of `length` tokens, bos included, evenly from the whole text; as many as it has."""
    head = [] if bos is None else [bos]
    own = max(min(length - len(head), len(ids)), 1)
    last = len(ids) - own
    count = min(num_prompts, last + 1)
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return [[*head, *ids[start : start + own]] for start in starts]


def greedy_match(
    model: LoadedModel,
    reference: Reference,
    prompts: Sequence[list[int]],
    num_tokens: int,
    kv_cache_dtype: str,
) -> GreedyMatch:
    """Generate for all prompts at once, and compare each token with the reference's choice after
    the same tokens: as long as all were equal that is the reference's own greedy text."""
    outputs = _generate(model, prompts, num_tokens, kv_cache_dtype)
    lengths = []
    for prompt, tokens in zip(prompts, outputs, strict=True):
        rows = reference.rows(Window([*prompt, *tokens[:-1]], tokens))
        equal = rows(0, len(tokens)).argmax(-1) == torch.tensor(tokens)
        lengths.append(int(equal.long().cumprod(0).sum()))
    whole = sum(length == num_tokens for length in lengths)
    return GreedyMatch(len(prompts), num_tokens, sum(lengths) / len(lengths), whole)


def _generate(
    model: LoadedModel, prompts: Sequence[list[int]], num_tokens: int, kv_cache_dtype: str
) -> list[list[int]]:
    """Greedy tokens of each prompt; raises what a request fails of."""
    num_seqs = min(len(prompts), model.limits.max_num_seqs)
    block = model.limits.block_size
    longest = max(map(len, prompts)) + num_tokens
    config = ExecutorConfig(
        max_num_seqs=num_seqs,
        kv_cache_tokens=(-(-longest // block) + 1) * block * num_seqs,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False,
    )
    executor = Executor(model, config)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for name, prompt in enumerate(prompts):
        executor.add_request(NewRequest(str(name), prompt, params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while executor.has_unfinished:
        for output in executor.step():
            if output.error is not None:
                raise output.error
            tokens[int(output.request_id)] += output.token_ids
    return tokens
