"""What a compile can be asked for: one frozen dataclass, validated once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from inlay.backends.base import BACKEND_OPTIONS
from inlay.backends.device import DEVICES
from inlay.backends.select import BACKENDS
from inlay.backends.tensorrt.library import AUTO, LIBRARIES, TARGETS
from inlay.errors import OptionError
from inlay.passes.quantize.config import NONE, parse_quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VERIFY = ("capture", "engine", "pass")
BLOCK_SIZES = (16, 32, 64, 128)

DEFAULT_MAX_SEQ_LEN = 4096
"""Where neither the option nor the model's config sets a limit."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Options of `compile_model` and `inlay build`.

    backend: what runs the segments: "inductor" (compiled), "onnxruntime" (its kernels for CPUs, or
        for CUDA where onnxruntime-gpu is installed), "tensorrt" (engines for GPUs) or "eager" (the
        reference).
    device: of the backends "inductor" and "eager": "cpu" or "cuda"; "auto" is for Inductor the GPU
        where torch sees one, else the CPU, and for eager, the reference, the CPU.
    dtype: "float32", "bfloat16" or "float16", of weights, activations and KV cache; "auto" takes
        the checkpoint's.
    max_seq_len: tokens of one request, prompt and output together; None takes the model's.
    max_num_tokens: tokens in one step over all requests: longer prompts are chunked.
    max_num_seqs: requests in one step.
    quantization: "none", or a format and its settings, see `QuantizationConfig`: "w8a8" (int8),
        "w8a16", "w4a16", "fp8", "w4a16,group_size=128,method=gptq,calibration=texts.jsonl" ...
        A checkpoint that is quantized already keeps its own.
    block_size: tokens that a KV block holds: 16, 32, 64 or 128.
    optimization_level: 0 to 3, of the C++ compiler for the code that calls the kernels, which
        are always fully optimized: 0 (the default) builds fastest, 1 decodes some 3 % faster on a
        CPU. On CUDA 3 also times plain products: cuBLAS's beside Inductor's Triton templates.
    verify: "capture" compares the captured graph with Hugging Face; "engine" (the default) also
        the finished engine; "pass" also the graph after each pass, naming the first that errs.
    trust_remote_code: run Python code that comes with a checkpoint (auto_map in its config); read
        it first. Without it such a checkpoint is refused, or run by transformers' own class.
    library: of the backend "tensorrt": "tensorrt_rtx" or "tensorrt"; "auto" takes the first of
        them that is installed.
    target: of the backend "tensorrt", the GPUs that the engines are for: "sm75", "sm80", "sm86",
        "sm89", "sm120", "sm121"; "auto" is sm80 and later.
    fallback: of the backend "tensorrt": "inductor" lets Inductor run what TensorRT cannot take;
        "none" refuses such a model.
    whole: of the backend "onnxruntime": also write the whole model as one standard ONNX file,
        model.onnx, for other runtimes: one request, its keys and values as inputs and outputs.
    """

    backend: str = "inductor"
    device: str = AUTO
    dtype: str = "auto"
    max_seq_len: int | None = None
    max_num_tokens: int = 2048
    max_num_seqs: int = 64
    quantization: Any = NONE
    block_size: int = 32
    optimization_level: int = 0
    verify: str = "engine"
    trust_remote_code: bool = False
    library: str = AUTO
    target: str = AUTO
    fallback: str = NONE
    whole: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        parsed = parse_quantization(self.quantization)
        object.__setattr__(self, "quantization", NONE if parsed is None else parsed)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, ("auto", *DTYPES))
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("optimization_level", self.optimization_level, (0, 1, 2, 3))
        _one_of("verify", self.verify, VERIFY)
        _one_of("trust_remote_code", self.trust_remote_code, (False, True))
        _one_of("library", self.library, (AUTO, *LIBRARIES))
        _one_of("target", self.target, TARGETS)
        _one_of("fallback", self.fallback, (NONE, "inductor"))
        _one_of("whole", self.whole, (False, True))
        for name, owners in BACKEND_OPTIONS.items():
            value, default = getattr(self, name), getattr(CompileOptions, name)
            if self.backend not in owners and value != default:
                has_it = " or ".join(map(repr, owners))
                raise OptionError(
                    f"{name} is an option of backend={has_it}; backend {self.backend!r} has none, "
                    f"got {value!r}: leave it out"
                )
        for name, least in (("max_seq_len", 2), ("max_num_tokens", 2), ("max_num_seqs", 1)):
            value = getattr(self, name)
            if value is None and name == "max_seq_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.max_num_tokens < self.max_num_seqs:
            raise OptionError(
                f"max_num_tokens must be at least max_num_seqs ({self.max_num_seqs}), so that "
                f"every running request gets a token in every step, got {self.max_num_tokens}; "
                "give max_num_seqs too"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data, each value as a flag of `inlay build` takes it."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**given, "quantization": str(self.quantization)}

    @staticmethod
    def from_kwargs(kwargs: dict[str, Any]) -> CompileOptions:
        """Raises OptionError for a keyword that is not an option."""
        known = CompileOptions.__dataclass_fields__
        for name in kwargs:
            if name not in known:
                raise OptionError(f"unknown option {name!r}; options are {', '.join(known)}")
        return CompileOptions(**kwargs)


def _one_of(name: str, value: Any, allowed: Any) -> None:
    # By type as well: 16.0 and True equal integers.
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise OptionError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def check_against_model(options: CompileOptions, limit: int | None) -> int:
    """The engine's max_seq_len, from the option or the model's own limit (None: it has none).

    Raises:
        OptionError: the option is beyond what the model's positions reach.
    """
    if options.max_seq_len is None:
        return limit or DEFAULT_MAX_SEQ_LEN
    if limit is not None and options.max_seq_len > limit:
        raise OptionError(
            f"max_seq_len must be at most the model's max_position_embeddings ({limit}), got "
            f"{options.max_seq_len}"
        )
    return options.max_seq_len
