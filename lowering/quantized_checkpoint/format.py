"""What the formats have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ModelLoadError, UnsupportedModelError
from inlay.lowering.quantized_checkpoint.layer import Stored
from inlay.passes.quantize.config import Scheme

Facts = Mapping[str, Any]

DYNAMIC_PER_TENSOR = (
    "one activation scale for all tokens of a step is not used, since one request's numbers would "
    "change another's: each token has its own"
)


HEAD_NAMES = {"lm_head", "*lm_head", ".*lm_head", "*lm_head*", ".*lm_head.*"}


class Format:
    """How a quantized weight lies in a checkpoint.

    main: names behind the module's of the tensor that holds its numbers, one of which must be
    there. parts: of the other tensors that belong to it; required: those that must be there.
    notes: what differs from what the checkpoint asks for, told once each. schemes: those whose
    activations have dynamic scales, as far as the config alone can tell.
    """

    name = ""
    main: tuple[str, ...] = ("weight",)
    parts: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    dtype = torch.bfloat16
    """Of what is not quantized, where the config does not say."""

    def __init__(self, facts: Facts) -> None:
        """facts: the quantization part of config.json. Raises UnsupportedModelError."""
        self.facts = facts
        self.notes: set[str] = set()
        self.schemes: tuple[Scheme, ...] = ()

    @property
    def sure_schemes(self) -> tuple[Scheme, ...]:
        """`schemes`, where the config leaves out no more than the head; else nobody knows yet."""
        inner = self.facts.get("quantization")
        facts = inner if isinstance(inner, Mapping) else self.facts  # ModelOpt's own file
        keys = ("ignore", "modules_to_not_convert", "exclude_modules")
        left_out = {name.removeprefix("re:") for key in keys for name in facts.get(key) or ()}
        return () if left_out - HEAD_NAMES else self.schemes

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        """One module's weight; tensors by their names behind the module's.

        Raises ModelLoadError that names a tensor which does not fit.
        """
        raise NotImplementedError


def refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}; take another one of this model, or its float32, bfloat16 or float16 checkpoint"
    )


def check_choice(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise refused(f"checkpoints with {what} {value!r} are not supported, allowed are {choices}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ModelLoadError(
            f"tensor {name} is {list(tensor.shape)}, expected {list(expected)} from the others of "
            "its layer and the config; the checkpoint is damaged or its config is another's"
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def check_type(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ModelLoadError(f"tensor {name} is {tensor.dtype}, expected {names}")


def check_words(name: str, words: Tensor) -> None:
    """Raises ModelLoadError for what is no matrix of numbers packed into int32."""
    check_type(name, words, torch.int32)
    if words.dim() != 2:
        raise ModelLoadError(f"tensor {name} is {list(words.shape)}, expected two dimensions")


def check_scales(name: str, scales: Tensor) -> Tensor:
    """Raises ModelLoadError where scales of activations are not above 0 and finite."""
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ModelLoadError(
            f"tensor {name} holds {scales.flatten()[0].item():g}: a scale must be above 0 and "
            "finite; the checkpoint is damaged"
        )
    return scales


def one_number(name: str, tensor: Tensor) -> Tensor:
    """A scale for everything, as [1]."""
    if tensor.numel() != 1:
        raise ModelLoadError(f"tensor {name} is {list(tensor.shape)}, expected one number")
    return tensor.reshape(1)


def block_scales(name: str, scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Scales of blocks [N / b, K / c], the last of which may be smaller, as [K / c, N]."""
    grid = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    check_shape(name, scale, grid)
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.float()
    return scale.repeat_interleave(block[0], 0)[: shape[0]].t().contiguous()
