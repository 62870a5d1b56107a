"""What `inlay eval` can be asked for, and how much worse than its reference an engine may be."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.errors import OptionError
from inlay.passes.kv_formats import parse_kv_cache_dtype

LIMITS = {"w8a16": 0.005, "w8a8": 0.01, "fp8": 0.01, "w4a16": 0.03}
"""By how much a quantization may raise the perplexity, as a share of the reference's."""

UNQUANTIZED_LIMITS = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
"""The same where only activations are rounded."""

NARROW_KV_EXTRA = 0.005
"""What a KV cache in int8 or fp8 may cost on top."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """How an engine is judged.

    window: most tokens that the model sees at once; None takes the engine's max_seq_len, at most
        1024.
    stride: tokens judged in each window, behind those that are only seen; None is half a window.
    max_tokens: judge the text's first tokens only; None is all of them.
    kv_cache_dtype: of the engine's KV cache: "auto" (the model's), "float32", "bfloat16",
        "float16", "fp8" or "int8".
    limit: by how much the perplexity may be higher than the reference's, as a share (0.01 is 1 %);
        None takes what is due for the engine's quantization, data type and KV cache.
    num_prompts: prompts, cut from the text, that the engine continues greedily; 0 for none.
    num_greedy_tokens: tokens for each of them.
    """

    window: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    limit: float | None = None
    num_prompts: int = 32
    num_greedy_tokens: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_dtype", parse_kv_cache_dtype(self.kv_cache_dtype))
        least = {"window": 2, "stride": 1, "max_tokens": 1, "num_prompts": 0}
        for name, smallest in {**least, "num_greedy_tokens": 1}.items():
            value = getattr(self, name)
            if value is None and name in ("window", "stride", "max_tokens"):
                continue
            if type(value) is not int or value < smallest:
                raise OptionError(
                    f"{name} must be an integer of at least {smallest}, got {value!r}"
                )
        is_number = isinstance(self.limit, int | float) and not isinstance(self.limit, bool)
        if self.limit is not None and not (is_number and 0 <= self.limit < float("inf")):
            raise OptionError(
                f"limit must be a share of the reference's perplexity, 0.01 for 1 %, got "
                f"{self.limit!r}"
            )


def default_limit(quantization: str | None, dtype: str, kv_cache_dtype: str) -> float:
    """The most that the perplexity may rise, as a share.

    quantization: as an artifact names it, "w4a16,group_size=32"; its format decides.
    Raises OptionError for a quantization of which none is known.
    """
    format_ = (quantization or "").split(",")[0]
    if not format_:
        limit = UNQUANTIZED_LIMITS[dtype]
    elif format_ in LIMITS:
        limit = LIMITS[format_]
    else:
        raise OptionError(
            f"no limit is known for the quantization {quantization!r}, only for "
            f"{', '.join(LIMITS)}; give limit (--limit)"
        )
    return limit + (NARROW_KV_EXTRA if kv_cache_dtype in ("fp8", "int8") else 0.0)
