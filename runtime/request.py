"""A request inside the executor, and what is asked of it at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from numbers import Integral

from inlay.errors import RequestError
from inlay.runtime.outputs import FinishReason
from inlay.runtime.sampling_params import SamplingParams


class RequestState(Enum):
    """WAITING holds nothing; RUNNING holds a slot and blocks; FINISHED gave them back."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """One request, from arrival to finish.

    token_ids: the prompt and what was sampled so far.
    max_total_tokens: prompt and output together never exceed this.
    num_computed_tokens: how many of token_ids are in the KV cache.
    slot: its place in the block tables and the sampler's tensors while it runs, else -1.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    max_total_tokens: int
    num_computed_tokens: int = 0
    slot: int = -1
    state: RequestState = RequestState.WAITING
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens the next steps have to run; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all that is left to run is the token sampled last."""
        return len(self.token_ids) > self.num_prompt_tokens and self.num_uncomputed_tokens == 1

    def append(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Take a sampled token; returns why this ends the request (or None), and the stop id."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.stop_token_ids:
            return "stop", token_id
        return ("length" if len(self.token_ids) >= self.max_total_tokens else None), None


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_seq_len: int) -> list[int]:
    """The prompt as a list of ints; RequestError if it is empty, too long or not of this model."""
    if len(token_ids) == 0:
        raise RequestError("the prompt is empty; give at least one token")
    if len(token_ids) >= max_seq_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens; the engine's max_seq_len is {max_seq_len},"
            f" prompt and output together, so at most {max_seq_len - 1} fit: shorten the prompt,"
            " or build the engine with a larger max_seq_len"
        )
    check_vocabulary("prompt token ids", token_ids, vocab_size)
    return [int(i) for i in token_ids]


def check_vocabulary(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """RequestError that names the first id that is no integer in [0, vocab_size)."""
    for position, token_id in enumerate(ids):
        is_int = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not is_int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} must be integers in [0, {vocab_size}), the model's vocabulary;"
                f" given {token_id!r} at position {position}"
            )
