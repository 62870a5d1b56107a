"""The executor's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from inlay.backends.base import ModelLimits
from inlay.errors import OptionError

SMALLEST = {
    "max_num_tokens": 2,  # steps are padded to two tokens
    "max_num_seqs": 1,
    "max_seq_len": 2,  # a prompt token and an output token
    "kv_cache_tokens": 1,
    "kv_cache_memory": 1,
    "host_cache_memory": 0,
}

CHOICES = {
    "scheduler_policy": ("guaranteed_no_evict", "max_utilization"),
    "overlap": (None, True, False),
    "cuda_graphs": (None, True, False),
    "enable_prefix_caching": (True, False),
    "batch_invariant": (True, False),
    "kv_events": (True, False),
    "debug": (True, False),
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
    kv_cache_free_fraction: share of the free memory for the KV cache, in (0, 1]; instead of those.
    kv_cache_dtype: "auto" (the model's), "float32", "bfloat16", "float16", "fp8" or "int8".
    enable_prefix_caching: requests that begin alike share blocks.
    host_cache_memory: bytes of host memory for cached blocks that the device gave up.
    kv_events: record which blocks are stored and removed, for `get_kv_events`.
    scheduler_policy: "guaranteed_no_evict" or "max_utilization", see the scheduler.
    overlap: launch a step before the results of the one before it are read; None: where the device
        works by itself.
    cuda_graphs: run decode steps from graphs captured for padded sizes; None: on CUDA. On a CPU the
        steps are padded in the same way and called plainly.
    batch_invariant: a request's logits are bitwise the same alone and in any batch, chunked or not,
        with cached prefixes or without; for one artifact, machine and number of threads. Backend
        "inductor" only; it costs speed on CPUs other than those with AVX-512 and without AMX.
    logits_processors: "module:Class" or "module:Class:{json arguments}", applied to all requests.
    iteration_log: a file that gets a line of JSON for each step.
    eos_token_ids: tokens that end a request, unless it ignores them.
    debug: check the invariants of blocks and slots after every step.

    Raises OptionError where a value is not allowed.
    """

    max_num_tokens: int | None = None
    max_num_seqs: int | None = None
    max_seq_len: int | None = None
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None
    kv_cache_free_fraction: float | None = None
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    host_cache_memory: int = 0
    kv_events: bool = False
    scheduler_policy: Literal["guaranteed_no_evict", "max_utilization"] = "guaranteed_no_evict"
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    batch_invariant: bool = False
    logits_processors: Sequence[str] = ()
    iteration_log: str | None = None
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
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                text = ", ".join(map(repr, allowed))
                raise OptionError(f"{name} must be one of {text}; given {getattr(self, name)!r}")
        share = self.kv_cache_free_fraction
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share <= 1):
            raise OptionError(f"kv_cache_free_fraction must be in (0, 1]; given {share!r}")
        names = self.logits_processors
        if not (isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)):
            raise OptionError(
                "logits_processors must be a list of 'module:Class' or 'module:Class:{json}'; "
                f"given {names!r}"
            )
        sizes = ("kv_cache_tokens", "kv_cache_memory", "kv_cache_free_fraction")
        given = {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if len(given) > 1:
            raise OptionError(
                f"{' and '.join(given)} both size the KV cache: leave one out; given "
                f"{', '.join(map(str, given.values()))}"
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
