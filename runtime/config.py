"""The executor's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inlay.backends.base import ModelLimits
from inlay.errors import OptionError

SMALLEST = {
    "max_num_tokens": 2,  # steps are padded to two tokens
    "max_num_seqs": 1,
    "max_seq_len": 2,  # a prompt token and an output token
    "kv_cache_tokens": 1,
    "kv_cache_memory": 1,
}


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How the runtime uses a model; None takes what the model was built for.

    max_num_tokens: tokens a step runs, over all its requests; longer prompts are chunked.
    max_num_seqs: requests that run at once.
    max_seq_len: prompt and output of a request together, in tokens.
    kv_cache_tokens: tokens the KV cache holds. Without it and kv_cache_memory: room for
        max_num_seqs requests of max_seq_len, but at most a quarter of the free memory.
    kv_cache_memory: bytes of the KV cache, over all layers; instead of kv_cache_tokens.
    eos_token_ids: tokens that end a request, unless it ignores them.
    debug: check the invariants of blocks and slots after every step.

    Raises OptionError where a value is not allowed.
    """

    max_num_tokens: int | None = None
    max_num_seqs: int | None = None
    max_seq_len: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None
    eos_token_ids: Sequence[int] = ()
    debug: bool = False

    def __post_init__(self) -> None:
        """Validate what can be validated without a model."""
        for name, smallest in SMALLEST.items():
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_int and value >= smallest):
                raise OptionError(f"{name} must be an integer >= {smallest}; given {value!r}")
        ends = self.eos_token_ids
        if not (isinstance(ends, list | tuple) and all(isinstance(i, int) for i in ends)):
            raise OptionError(f"eos_token_ids must be a list of token ids; given {ends!r}")
        if self.kv_cache_tokens is not None and self.kv_cache_memory is not None:
            raise OptionError(
                "kv_cache_tokens and kv_cache_memory both size the KV cache: leave one out; given"
                f" {self.kv_cache_tokens} and {self.kv_cache_memory}"
            )

    def narrow(self, limits: ModelLimits) -> ModelLimits:
        """The model's limits, made smaller where these options say so.

        Raises OptionError where an option exceeds what the model was built for.
        """
        for name in ("max_num_tokens", "max_num_seqs", "max_seq_len"):
            value, limit = getattr(self, name), getattr(limits, name)
            if value is not None and value > limit:
                raise OptionError(
                    f"{name} can be at most {limit}, which the engine was built for; given"
                    f" {value}: lower it, or build the engine with {name}={value}"
                )
            limits = replace(limits, **{name: limit if value is None else value})
        if limits.max_num_tokens < limits.max_num_seqs:
            raise OptionError(
                "max_num_tokens must be at least max_num_seqs, so that every running request gets"
                f" a token in every step; given {limits.max_num_tokens} and {limits.max_num_seqs}"
            )
        return limits
