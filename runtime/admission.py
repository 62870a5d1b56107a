"""What a request must be to come in: everything that can be known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inlay.backends.base import ModelLimits
from inlay.errors import RequestError
from inlay.runtime.request import RequestOptions, check_prompt, check_vocabulary
from inlay.runtime.sampling_params import SamplingParams


@dataclass(frozen=True)
class Admission:
    """An engine's limits, in plain data, so that the API's process can check at the door.

    limits: the model's, made smaller by the executor's options. kv_cache_tokens: tokens that the
    KV cache holds. is_encoder: the model gives hidden states of whole requests only.
    in_process: whether a request may bring Python callables.
    """

    limits: ModelLimits
    kv_cache_tokens: int
    is_encoder: bool = False
    in_process: bool = True

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        options: RequestOptions | None = None,
    ) -> list[int]:
        """The prompt as ints; RequestError, naming the fault, where the request can never run."""
        limits = self.limits
        token_ids = check_prompt(prompt_token_ids, limits.vocab_size, limits.max_seq_len)
        limits.refuse_padding(token_ids)
        for name, ids in params.named_token_ids.items():
            check_vocabulary(name, ids, limits.vocab_size)
        if params.bad_words:
            raise RequestError(
                f"bad_words are text and must be token ids here, given {params.bad_words!r}: give "
                "bad_words_ids, or use LLM, which has a tokenizer"
            )
        self._check_room(len(token_ids), params)
        return token_ids

    def max_total_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Prompt and output of one sequence together, at most."""
        if params.max_tokens is None:
            return self.limits.max_seq_len
        return min(num_prompt_tokens + params.max_tokens, self.limits.max_seq_len)

    def _check_room(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        total = self.max_total_tokens(num_prompt_tokens, params)
        block_size = self.limits.block_size
        needed, has = -(-total // block_size), self.kv_cache_tokens // block_size
        if needed > has:
            raise RequestError(
                f"the request may grow to {total} tokens ({num_prompt_tokens} of prompt), {needed}"
                f" blocks of the KV cache, which has {has} blocks ({self.kv_cache_tokens} tokens):"
                " lower max_tokens, or raise kv_cache_tokens or kv_cache_memory"
            )
