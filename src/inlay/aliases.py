"""What vLLM and TensorRT-LLM call their options, and what becomes of each here.

One table for constructors, one for TensorRT-LLM's kv_cache_config, one for calls. A rule takes an
option's name and value and gives ours, or raises OptionError that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inlay.errors import OptionError, RequestError

Rule = Callable[[str, Any], dict[str, Any]]


def same_as(ours: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """Another name for an option of ours; None is our default."""
    return lambda name, value: {} if value is None else {ours: convert(value)}


def ours_unless(*off: Any) -> Rule:
    """An option of ours, where some values say no more than our default."""
    return lambda name, value: {} if value in off else {name: value}


def without_effect(name: str, value: Any) -> dict[str, Any]:
    """Tunes machinery that does not exist here; results do not depend on it."""
    return {}


def not_built(what: str, *off: Any) -> Rule:
    """A feature that is missing; the values in `off`, and None, ask for nothing of it."""
    return refused(f"{what} is not built yet", *off)


def refused(why: str, *off: Any) -> Rule:
    """Anything but None and the values in `off` is refused, with what to do."""

    def rule(name: str, value: Any) -> dict[str, Any]:
        if any(value is one or (type(value) is type(one) and value == one) for one in (None, *off)):
            return {}
        allowed = ", ".join(map(repr, off or (None,)))
        raise OptionError(f"{name}={value!r}: {why}; allowed: {allowed}")

    return rule


def switches(ours: str, when: bool, to: Any) -> Rule:
    """A bool of which one value sets an option of ours and the other leaves our default."""

    def rule(name: str, value: Any) -> dict[str, Any]:
        if value not in (None, True, False):
            raise OptionError(f"{name} must be True or False; given {value!r}")
        return {ours: to} if value is not None and bool(value) is when else {}

    return rule


def _dtype(name: str, value: Any) -> dict[str, Any]:
    words = {"half": "float16", "float": "float32"}
    return {} if value in (None, "auto") else {"dtype": words.get(str(value), value)}


def _gigabytes(value: Any) -> Any:
    return int(value * 2**30) if isinstance(value, int | float) else value


def _policy(value: Any) -> str:
    """GUARANTEED_NO_EVICT, as a text or a member of TensorRT-LLM's enum."""
    return str(getattr(value, "value", value)).rsplit(".", 1)[-1].lower()


def _kv_cache_config(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else translate(_fields(name, value), KV_CACHE_CONFIG, name)


def _scheduler_config(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else translate(_fields(name, value), SCHEDULER_CONFIG, name)


def _fields(name: str, value: Any) -> dict[str, Any]:
    """What was set of a config, given as a mapping or as an object of TensorRT-LLM's classes."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_unset=True)
    if hasattr(value, "__dict__"):
        return {key: one for key, one in vars(value).items() if not key.startswith("_")}
    raise OptionError(f"{name} must be a dict or a config object; given {value!r}")


_PARALLEL = "running one model on several devices"

CONSTRUCTOR: dict[str, Rule] = {
    # Sizes.
    "max_model_len": same_as("max_seq_len"),
    "max_num_batched_tokens": same_as("max_num_tokens"),
    "max_batch_size": same_as("max_num_seqs"),
    "max_input_len": refused("prompt and output together are limited: give max_seq_len"),
    "max_beam_width": without_effect,
    "max_seq_len_to_capture": without_effect,
    # The KV cache. vLLM's share is of all memory, weights included; ours of what they leave free.
    "gpu_memory_utilization": same_as("kv_cache_free_fraction"),
    "kv_cache_memory_bytes": same_as("kv_cache_memory"),
    "num_gpu_blocks_override": refused("give kv_cache_tokens: blocks times block_size"),
    "enable_prefix_caching": ours_unless(None),
    "kv_cache_dtype": ours_unless(None),
    "kv_cache_config": _kv_cache_config,
    "swap_space": same_as("host_cache_memory", _gigabytes),
    "cpu_offload_gb": not_built("keeping weights in host memory", 0, 0.0),
    "sliding_window": refused("windows are the model's own, and kept"),
    # The loop.
    "scheduler_config": _scheduler_config,
    "scheduling_policy": refused(
        "requests have priorities: give generate(priority=...)", "fcfs", "priority"
    ),
    "enable_chunked_prefill": refused("prompts are always chunked where they must be", True),
    "enforce_eager": switches("cuda_graphs", True, False),
    "cuda_graph_config": refused("sizes are chosen by themselves: give cuda_graphs=True or False"),
    "disable_overlap_scheduler": switches("overlap", True, False),
    "async_scheduling": same_as("overlap"),
    "num_scheduler_steps": refused("each step is scheduled", 1),
    "distributed_executor_backend": not_built(_PARALLEL, "mp", "uni"),
    "disable_log_stats": without_effect,
    "disable_custom_all_reduce": without_effect,
    "max_logprobs": without_effect,
    "compilation_config": refused("give optimization_level and the other options of compile_model"),
    # The model.
    "dtype": _dtype,
    "device": ours_unless(None, "auto"),
    "trust_remote_code": ours_unless(None, False),
    "tokenizer_mode": refused("the tokenizer is transformers': give tokenizer=", "auto", "hf"),
    "skip_tokenizer_init": refused(
        "the tokenizer costs nothing where prompts are token ids", False
    ),
    "load_format": refused(
        "checkpoints are safetensors, read by transformers", "auto", "safetensors"
    ),
    "revision": refused("download that revision and give its directory"),
    "tokenizer_revision": refused("download that revision and give tokenizer=directory"),
    "code_revision": refused("download that revision and give its directory"),
    "download_dir": refused("set HF_HOME before the program starts"),
    "hf_token": refused("set HF_TOKEN before the program starts"),
    "hf_overrides": refused("change the config of a model in memory and give that", {}),
    "task": refused(
        "a decoder generates, embeds and scores; an encoder embeds", "auto", "generate", "embed"
    ),
    "runner": refused(
        "a decoder generates, embeds and scores; an encoder embeds", "auto", "generate", "pooling"
    ),
    "generation_config": refused(
        "the model's own is honoured: override it by SamplingParams", "auto"
    ),
    "build_config": refused("give max_seq_len, max_num_tokens and max_num_seqs"),
    # What is not built yet.
    "tensor_parallel_size": not_built(_PARALLEL, 1),
    "pipeline_parallel_size": not_built(_PARALLEL, 1),
    "data_parallel_size": not_built(_PARALLEL, 1),
    "context_parallel_size": not_built(_PARALLEL, 1),
    "moe_expert_parallel_size": not_built(_PARALLEL, 1, -1),
    "enable_expert_parallel": not_built(_PARALLEL, False),
    "gpus_per_node": not_built(_PARALLEL, 1),
    "quant_config": refused("give quantization, such as 'w8a8', 'w4a16' or 'fp8'"),
    "speculative_config": not_built("speculative decoding"),
    "speculative_model": not_built("speculative decoding"),
    "num_speculative_tokens": not_built("speculative decoding", 0),
    "enable_lora": not_built("LoRA", False),
    "lora_config": not_built("LoRA"),
    "max_loras": not_built("LoRA", 1),
    "max_lora_rank": not_built("LoRA", 16),
    "enable_prompt_adapter": not_built("adapters of prompts", False),
    "guided_decoding_backend": not_built("guided decoding", "auto"),
    "structured_outputs_config": not_built("guided decoding"),
    "kv_transfer_config": not_built("moving KV blocks between engines"),
    "cache_transceiver_config": not_built("moving KV blocks between engines"),
    "limit_mm_per_prompt": refused("only text goes in", {}),
    "mm_processor_kwargs": refused("only text goes in", {}),
}
"""Constructors' options of vLLM and TensorRT-LLM."""

KV_CACHE_CONFIG: dict[str, Rule] = {
    "enable_block_reuse": same_as("enable_prefix_caching"),
    "enable_partial_reuse": without_effect,
    "copy_on_partial_reuse": without_effect,
    "max_tokens": same_as("kv_cache_tokens"),
    "max_gpu_total_bytes": same_as("kv_cache_memory", lambda value: value or None),
    "free_gpu_memory_fraction": same_as("kv_cache_free_fraction"),
    "host_cache_size": same_as("host_cache_memory"),
    "dtype": same_as("kv_cache_dtype"),
    "event_buffer_max_size": same_as("kv_events", bool),
    "tokens_per_block": refused("it belongs to the build: give block_size"),
    "max_attention_window": refused("windows are the model's own, and kept"),
    "sink_token_length": refused("sinks are the model's own, and kept"),
    "secondary_offload_min_priority": without_effect,
    "onboard_blocks": refused("blocks in host memory are always copied back to be used", True),
    "cross_kv_cache_fraction": not_built("models of encoder and decoder"),
}
SCHEDULER_CONFIG: dict[str, Rule] = {
    "capacity_scheduler_policy": same_as("scheduler_policy", _policy),
    "context_chunking_policy": without_effect,
    "dynamic_batch_config": without_effect,
}

CALL: dict[str, Rule] = {
    "lora_request": not_built("LoRA", []),
    "prompt_adapter_request": not_built("adapters of prompts"),
    "guided_options_request": not_built("guided decoding"),
    "guided_decoding": not_built("guided decoding"),
    "structured_outputs": not_built("guided decoding"),
    "guided_decoding_params": not_built("guided decoding"),
    "disaggregated_params": not_built("moving KV blocks between engines"),
    "kv_cache_retention_config": refused("give cache_priority=0 to 100"),
    "scheduling_params": refused("give priority="),
    "mm_processor_kwargs": refused("only text goes in", {}),
    "tokenization_kwargs": refused("tokenize by yourself and give token ids", {}),
    "truncate_prompt_tokens": refused("tokenize by yourself and give the token ids to keep"),
    "prompt_token_ids": refused("give the token ids as the prompts"),
    "inputs": refused("give them as the prompts"),
    "trace_headers": without_effect,
}
"""Arguments of calls in vLLM and TensorRT-LLM."""


def translate(
    options: Mapping[str, Any], table: Mapping[str, Rule] = CONSTRUCTOR, within: str = ""
) -> dict[str, Any]:
    """Options by our names; what the table does not know stays as it is.

    Raises OptionError for what is refused, and where two names of one option differ.
    """
    found: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in options.items():
        if within and name not in table:
            raise OptionError(f"{within} knows no {name!r}; allowed: {', '.join(table)}")
        full_name = f"{within}.{name}" if within else name
        ours = table[name](full_name, value) if name in table else {name: value}
        for key, one in ours.items():
            if key in found and found[key] != one:
                raise OptionError(
                    f"{given_as[key]} and {full_name} are one option, {key}; given {found[key]!r}"
                    f" and {one!r}: leave one out"
                )
            found[key], given_as[key] = one, full_name
    return found


def refuse_in_call(options: Mapping[str, Any], method: str) -> None:
    """Raises RequestError for arguments of a call that are refused, or that nobody knows."""
    for name, value in options.items():
        if name not in CALL:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        try:
            CALL[name](name, value)
        except OptionError as error:
            raise RequestError(str(error)) from error
