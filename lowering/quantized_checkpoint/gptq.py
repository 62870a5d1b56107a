"""GPTQ checkpoints of AutoGPTQ, GPTQModel and optimum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inlay.errors import ModelLoadError
from inlay.lowering.quantized_checkpoint.format import (
    FLOATS,
    INTEGERS,
    Facts,
    Format,
    check_choice,
    check_shape,
    check_type,
    check_words,
)
from inlay.lowering.quantized_checkpoint.layer import Stored, signed, unpack


class GPTQ(Format):
    """qweight int32 [K * bits / 32, N]: numbers of neighbouring inputs in a word, the first in its
    lowest bits. qzeros int32 [G, N * bits / 32], scales [G, N], g_idx int32 [K]: each input's group
    (Frantar et al., 2022; "act order" numbers them by importance).

    A weight is (number - zero) * scale. In the format "gptq" the stored zero is one less, modulo
    2 ** bits, so that 15 stands for 0; in "gptq_v2" it is the zero itself.
    """

    name = "gptq"
    main = ("qweight",)
    parts = ("qzeros", "scales", "g_idx")
    required = ("qzeros", "scales")
    dtype = torch.float16

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        check_choice("gptq bits", facts.get("bits"), (4, 8))
        layout = facts.get("checkpoint_format") or facts.get("format") or "gptq"
        if facts.get("is_marlin_format"):
            layout = "marlin"
        check_choice("gptq format", layout, ("gptq", "gptq_v2"))
        self._added = 1 if layout == "gptq" else 0
        self._group_size = int(facts.get("group_size", -1))

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        qweight, scales = tensors["qweight"], tensors["scales"]
        groups = tensors.get("g_idx")
        bits = int(self.facts["bits"])
        for part in ("qweight", "qzeros"):
            check_words(f"{module}.{part}", tensors[part])
        check_type(f"{module}.scales", scales, *FLOATS)
        if groups is not None:
            check_type(f"{module}.g_idx", groups, *INTEGERS)
            check_shape(f"{module}.g_idx", groups, (groups.numel(),))
        if groups is not None and len(qweight) * 32 != len(groups) * bits:
            # GPTQModel may give a layer bits of its own (its setting "dynamic").
            bits = len(qweight) * 32 // max(len(groups), 1)
            check_choice(f"gptq bits of {module}", bits, (4, 8))
        if groups is None and self.facts.get("desc_act"):
            raise ModelLoadError(f"tensor {module}.g_idx is missing, and desc_act is set")
        size, rows = len(qweight) * 32 // bits, qweight.shape[1]
        check_shape(f"{module}.scales", scales, (len(scales), rows))
        check_shape(f"{module}.qzeros", tensors["qzeros"], (len(scales), rows * bits // 32))
        numbers = unpack(qweight.t(), bits)
        zeros = (unpack(tensors["qzeros"], bits) + self._added) & (2**bits - 1)
        stored = Stored(signed(numbers, bits), scales, groups=groups)
        if not bool((zeros == 2 ** (bits - 1)).all()):
            stored.zeros = signed(zeros, bits)
        if groups is None:
            stored.group_size = self._size(module, size, len(scales))
        elif not bool(((groups >= 0) & (groups < len(scales))).all()):
            raise ModelLoadError(f"tensor {module}.g_idx names groups that scales does not have")
        return stored

    def _size(self, module: str, size: int, num_groups: int) -> int:
        given = self._group_size if self._group_size > 0 else size
        if -(-size // given) != num_groups and size % num_groups == 0:
            given = size // num_groups  # GPTQModel's "dynamic" again
        if -(-size // given) != num_groups:
            raise ModelLoadError(
                f"tensor {module}.scales has {num_groups} groups, expected {-(-size // given)} of "
                f"{given} inputs"
            )
        return given
