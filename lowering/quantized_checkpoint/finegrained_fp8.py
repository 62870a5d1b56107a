"""FP8 with scales of blocks: DeepSeek-V3's and those of transformers' FineGrainedFP8Config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inlay.lowering.quantized_checkpoint.format import (
    Facts,
    Format,
    block_scales,
    check_choice,
    check_type,
    one_number,
)
from inlay.lowering.quantized_checkpoint.layer import Stored
from inlay.passes.quantize.config import Scheme


class FineGrainedFP8(Format):
    """weight float8_e4m3fn [N, K], weight_scale_inv [N / 128, K / 128] to multiply it with
    (DeepSeek-AI, 2024, arXiv:2412.19437, 3.3); activations get a scale per token and 128 inputs.

    Without weight_block_size there is one weight scale, and each token has one.
    """

    name = "fp8"
    parts = ("weight_scale_inv", "activation_scale", "input_scale")
    required = ("weight_scale_inv",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        check_choice("fp8 experts of type", facts.get("expert_dtype", "fp8"), ("fp8",))
        check_choice("fp8 numbers of type", facts.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"))
        scheme = facts.get("activation_scheme", "dynamic")
        check_choice("activation_scheme", scheme, ("dynamic", "static"))
        self._static = scheme == "static"
        block = facts.get("weight_block_size")
        self.schemes = () if self._static else (Scheme("fp8", "fp8"),)
        self._block = None if block is None else (int(block[0]), int(block[1]))
        if facts.get("scale_fmt") == "ue8m0":
            self.notes.add(
                "activation scales are not rounded to powers of two (scale_fmt ue8m0), which "
                "some of this format's kernels do: they are more exact"
            )

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        weight, name = tensors["weight"], f"{module}.weight_scale_inv"
        check_type(f"{module}.weight", weight, torch.float8_e4m3fn)
        scale = tensors["weight_scale_inv"]
        floats = torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu
        check_type(name, scale, *floats)
        static = tensors.get("activation_scale", tensors.get("input_scale"))
        if not self._static:
            static = None
        stored = Stored(weight, scale, activation="fp8")
        if static is not None:
            stored.input_scale = one_number(f"{module}.activation_scale", static).float()
        elif self._static:
            self.notes.add("layers without an activation_scale: each token has its own")
        if self._block is None:
            stored.scales = one_number(name, scale).float().expand(1, len(weight))
            stored.per_tensor = True
        else:
            stored.scales = block_scales(name, scale, weight.shape, self._block)
            stored.group_size = self._block[1]
        return stored
