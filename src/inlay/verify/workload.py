"""Requests through the real runtime: ragged, chunked, mixed with decode; every logits row kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from inlay.backends.base import KVGroup, LoadedModel, ModelLimits
from inlay.backends.step import StepInputs
from inlay.errors import OptionError
from inlay.runtime.config import ExecutorConfig
from inlay.runtime.executor import Executor
from inlay.runtime.request import NewRequest
from inlay.runtime.sampling_params import SamplingParams

LONGEST_PROMPT = 400
"""Tokens of the longest prompt, unless a sliding window wants a longer one."""

MAX_WINDOW_TO_COVER = 1024
"""Beyond this window, prompts longer than it would cost more than everything else together."""

CHUNK, NUM_SEQS = 64, 4
"""A token budget and a number of slots so small that prompts are chunked, and requests join while
others decode."""


@dataclass
class Request:
    """One greedy request: its prompt, the tokens it got, the logits that gave them [n, vocab], and
    in which step of the run each was made."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def logits(self) -> torch.Tensor:
        return torch.stack(self.rows)


@dataclass(frozen=True)
class Run:
    """What went in and came out: requests; steps, each step's inputs in order; num_blocks of the
    KV cache, with which the steps can be run again."""

    requests: list[Request]
    steps: list[StepInputs]
    num_blocks: int

    @property
    def num_tokens(self) -> int:
        return sum(len(request.tokens) for request in self.requests)


class _Recorder:
    """A `LoadedModel` that keeps what it was asked and what it answered."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.is_encoder: bool = model.is_encoder
        self.limits: ModelLimits = model.limits
        self.kv_groups: tuple[KVGroup, ...] = model.kv_groups
        self.device: torch.device = model.device
        self.steps: list[StepInputs] = []
        self.logits = torch.empty(0)

    def kv_groups_for(self, dtype: str | None) -> tuple[KVGroup, ...]:
        return self._model.kv_groups_for(dtype)

    def allocate_kv_cache(self, num_blocks: int | Sequence[int], dtype: str | None = None) -> None:
        self._model.allocate_kv_cache(num_blocks, dtype)

    def kv_tensors(self, group: int) -> list[torch.Tensor]:
        return self._model.kv_tensors(group)

    def make_batch_invariant(self) -> None:
        self._model.make_batch_invariant()

    def forward(self, step: StepInputs) -> torch.Tensor:
        return self.forward_hidden(step)[0]

    def forward_pieces(self, step: StepInputs) -> torch.Tensor:
        return self.forward(step)

    def forward_hidden(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        self.steps.append(step)
        logits, hidden = self._model.forward_hidden(step)
        self.logits = logits[: step.num_logits].float().cpu()
        return logits, hidden


def prompt_lengths(
    num_prompts: int, max_tokens: int, windows: Sequence[int], max_seq_len: int
) -> list[int]:
    """From 1 to several hundred tokens, evenly on a logarithmic scale; the longest goes beyond
    every sliding window, where it can.

    Raises OptionError where max_seq_len leaves no room for a prompt.
    """
    room = max_seq_len - max_tokens
    if room < 1:
        raise OptionError(
            f"max_tokens must be below max_seq_len ({max_seq_len}), so that a prompt fits, got "
            f"{max_tokens}"
        )
    covered = [window + CHUNK for window in windows if window <= MAX_WINDOW_TO_COVER]
    longest = min(max([LONGEST_PROMPT, *covered]), room)
    lengths = [round(longest ** (i / max(num_prompts - 1, 1))) for i in range(num_prompts)]
    if num_prompts == 1:
        lengths = [longest]
    # Neither sorted nor grouped: long and short ones share steps.
    return [lengths[i] for i in sorted(range(num_prompts), key=lambda i: (i * 7) % num_prompts)]


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def run_greedy(model: LoadedModel, prompts: Sequence[list[int]], max_tokens: int) -> Run:
    """Generate for all prompts at once, with chunks and slots that are too few for them.

    Raises RequestError for a prompt that the engine cannot take; what the model raises.
    """
    limits, longest = model.limits, max(len(prompt) for prompt in prompts) + max_tokens
    num_seqs = min(NUM_SEQS, limits.max_num_seqs)
    block = limits.block_size
    config = ExecutorConfig(
        max_num_tokens=max(min(CHUNK, limits.max_num_tokens), num_seqs),
        max_num_seqs=num_seqs,
        kv_cache_tokens=(-(-longest // block) + 1) * block * num_seqs,
        enable_prefix_caching=False,  # every row is to be run
        overlap=False,  # and read before the next
        debug=True,
    )
    recorder = _Recorder(model)
    executor = Executor(recorder, config)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    requests = [Request(prompt) for prompt in prompts]
    for name, request in enumerate(requests):
        executor.add_request(NewRequest(str(name), request.prompt, params))
    while executor.has_unfinished:
        outputs = executor.step()
        failed = next((output.error for output in outputs if output.error is not None), None)
        if failed is not None:
            raise failed
        # Rows come in the order of the outputs; a chunk that is not its prompt's last has none.
        assert len(outputs) <= len(recorder.logits), "a token without its logits row"
        for output, row in zip(outputs, recorder.logits, strict=True):
            request = requests[int(output.request_id)]
            request.tokens.append(output.token_ids[0])
            request.rows.append(row)
            request.steps.append(len(recorder.steps) - 1)
    num_blocks = max(pool.num_blocks for pool in executor.kv_cache.pools)
    return Run(requests, recorder.steps, num_blocks)
