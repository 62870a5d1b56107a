"""What a request must be to come in: everything that can be known before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inlay.backends.base import ModelLimits
from inlay.errors import RequestError
from inlay.runtime.kv_cache import most_held
from inlay.runtime.processors import check_processors
from inlay.runtime.request import RequestOptions, check_prompt, check_vocabulary
from inlay.runtime.sampling_params import SamplingParams


@dataclass(frozen=True)
class Admission:
    """An engine's limits, in plain data, so that the API's process can check at the door.

    limits: the model's, made smaller by the executor's options. windows, num_blocks: of each KV
    group, its window and its pool's size. is_encoder: the model gives hidden states of whole
    requests only.
    in_process: whether a request may bring Python callables.
    """

    limits: ModelLimits
    windows: tuple[int, ...]
    num_blocks: tuple[int, ...]
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
        options = options or RequestOptions()
        if self.is_encoder and options.pooling is None:
            raise RequestError(
                "this model is an encoder: it gives hidden states and generates nothing; use "
                "embed(), or give RequestOptions(pooling=...)"
            )
        if self.is_encoder and params.prompt_logprobs is not None:
            raise RequestError(
                "this model is an encoder: it has no logits, and prompt_logprobs must be None; "
                f"given {params.prompt_logprobs}"
            )
        room = limits.max_seq_len + (options.pooling is not None)
        token_ids = check_prompt(prompt_token_ids, limits.vocab_size, room)
        if self.is_encoder and len(token_ids) > limits.max_num_tokens:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; an encoder's prompts are run whole, and "
                f"max_num_tokens is {limits.max_num_tokens}: shorten it, or build the engine with "
                "a larger max_num_tokens"
            )
        if options.pooling is not None and params.num_sequences > 1:
            raise RequestError(
                f"an embedding is one vector: n, best_of and beams must be left out; given "
                f"{params.num_sequences} sequences"
            )
        check_processors(params, self.in_process)
        limits.refuse_padding(token_ids)
        for name, ids in params.named_token_ids.items():
            check_vocabulary(name, ids, limits.vocab_size)
        if params.bad_words:
            raise RequestError(
                f"bad_words are text and must be token ids here, given {params.bad_words!r}: give "
                "bad_words_ids, or use LLM, which has a tokenizer"
            )
        self._check_room(len(token_ids), params, options)
        return token_ids

    def max_total_tokens(
        self, num_prompt_tokens: int, params: SamplingParams, options: RequestOptions
    ) -> int:
        """Prompt and output of one sequence together, at most."""
        if options.pooling is not None:
            return num_prompt_tokens
        if params.max_tokens is None:
            return self.limits.max_seq_len
        return min(num_prompt_tokens + params.max_tokens, self.limits.max_seq_len)

    def _check_room(
        self, num_prompt_tokens: int, params: SamplingParams, options: RequestOptions
    ) -> None:
        count = params.num_sequences if options.pooling is None else 1
        if count > self.limits.max_num_seqs:
            raise RequestError(
                f"the request has {count} sequences (n, best_of or beams), which run at once; "
                f"max_num_seqs is {self.limits.max_num_seqs}: ask for fewer, or build the engine "
                "with a larger max_num_seqs"
            )
        total = self.max_total_tokens(num_prompt_tokens, params, options)
        size, chunk = self.limits.block_size, min(self.limits.max_num_tokens, total)
        most = most_held(self.windows, size, num_prompt_tokens, total, chunk, count)
        for needed, has in zip(np.sum(most, axis=0), self.num_blocks, strict=True):
            if needed > has:
                of_all = "" if count == 1 else f" in each of {count} sequences"
                raise RequestError(
                    f"the request may grow to {total} tokens ({num_prompt_tokens} of prompt)"
                    f"{of_all}, {needed} blocks of the KV cache, which has {has} blocks"
                    f" ({has * size} tokens): lower max_tokens, or raise kv_cache_tokens or"
                    " kv_cache_memory"
                )
