"""AWQ checkpoints of AutoAWQ (version "gemm")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inlay.lowering.quantized_checkpoint.format import (
    FLOATS,
    Facts,
    Format,
    check_choice,
    check_shape,
    check_type,
    check_words,
)
from inlay.lowering.quantized_checkpoint.layer import Stored, unpack

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word's eight numbers, lowest bits first, those of eight neighbouring outputs lie."""


class AWQ(Format):
    """qweight int32 [K, N / 8]: numbers of eight neighbouring outputs in a word, interleaved as
    PLACES says. qzeros int32 [G, N / 8] alike, scales [G, N]; a weight is (number - zero) * scale
    (Lin et al., 2023; the order is that of its CUDA kernel's registers)."""

    name = "awq"
    main = ("qweight",)
    parts = ("qzeros", "scales")
    required = parts
    dtype = torch.float16

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        check_choice("awq bits", facts.get("bits", facts.get("w_bit")), (4,))
        version = facts.get("version") or facts.get("format") or "gemm"
        version = "llm-awq" if facts.get("backend") == "llm-awq" else str(version).lower()
        check_choice("awq version", version, ("gemm",))

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        qweight, scales = tensors["qweight"], tensors["scales"]
        for part in ("qweight", "qzeros"):
            check_words(f"{module}.{part}", tensors[part])
        check_type(f"{module}.scales", scales, *FLOATS)
        size, rows = qweight.shape[0], qweight.shape[1] * 8
        check_shape(f"{module}.scales", scales, (len(scales), rows))
        check_shape(f"{module}.qzeros", tensors["qzeros"], (len(scales), qweight.shape[1]))
        given = int(self.facts.get("group_size", self.facts.get("q_group_size", -1)))
        given = given if given > 0 else size
        check_shape(f"{module}.scales", scales, (-(-size // given), rows))
        zeros = _outputs(tensors["qzeros"])
        return Stored(_outputs(qweight).t().contiguous(), scales, zeros, group_size=given)


def _outputs(words: Tensor) -> Tensor:
    """int32 [.., N / 8] to uint8 [.., N]."""
    return unpack(words, 4).unflatten(-1, (-1, 8))[..., list(PLACES)].flatten(-2)
