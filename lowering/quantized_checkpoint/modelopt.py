"""FP8 checkpoints of NVIDIA's ModelOpt (its unified Hugging Face export)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inlay.errors import ModelLoadError
from inlay.lowering.quantized_checkpoint.format import (
    Facts,
    Format,
    block_scales,
    check_choice,
    check_scales,
    check_shape,
    check_type,
    one_number,
)
from inlay.lowering.quantized_checkpoint.layer import Stored
from inlay.passes.quantize.config import Scheme

BLOCKS = "FP8_PB_WO"
ROWS = "FP8_PER_CHANNEL_PER_TOKEN"


class ModelOpt(Format):
    """weight float8_e4m3fn [N, K] and weight_scale to multiply it with: of algorithm "FP8" one
    number, with input_scale for the activations; of FP8_PER_CHANNEL_PER_TOKEN one for each row,
    activations by token; of FP8_PB_WO one for each block of 128 x 128, activations not rounded."""

    name = "modelopt"
    parts = ("weight_scale", "input_scale")
    required = ("weight_scale",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        inner = facts.get("quantization")
        inner = inner if isinstance(inner, Mapping) else facts
        self._algorithm = str(inner.get("quant_algo")).upper()
        check_choice("modelopt quant_algo", self._algorithm, ("FP8", ROWS, BLOCKS))
        self.schemes = (Scheme("fp8", "fp8"),) if self._algorithm == ROWS else ()

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        weight, scale = tensors["weight"], tensors["weight_scale"]
        name = f"{module}.weight_scale"
        check_type(f"{module}.weight", weight, torch.float8_e4m3fn)
        check_type(name, scale, torch.float32, torch.bfloat16, torch.float16)
        if self._algorithm == BLOCKS:
            grid = scale[:, 0, :, 0] if scale.dim() == 4 else scale
            scales = block_scales(name, grid, weight.shape, (128, 128))
            return Stored(weight, scales, group_size=128)
        if self._algorithm == ROWS:
            check_shape(name, scale.flatten(), (len(weight),))
            return Stored(weight, scale.reshape(1, -1), activation="fp8")
        scales = one_number(name, scale).expand(1, len(weight))
        if "input_scale" not in tensors:
            raise ModelLoadError(f"tensor {module}.input_scale is missing")
        name = f"{module}.input_scale"
        static = check_scales(name, one_number(name, tensors["input_scale"]).float())
        return Stored(weight, scales, activation="fp8", input_scale=static, per_tensor=True)
