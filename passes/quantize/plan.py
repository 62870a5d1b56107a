"""Which layer is quantized how, and what of it is known before its weight is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from inlay.passes.quantize.config import QuantizationConfig, Scheme

PARTS = ("values", "scales", "zeros", "smooth", "input_scale", "input_zero", "order")
"""What belongs to a quantized weight W, by the names W.values, W.scales ...

values, scales [G, N] and zeros [G, N]: as rounding.quantize_weight gives them. smooth: float32 [K];
the layer's input is divided by it, the weight multiplied with it before it is rounded. input_scale
float32 [1] and input_zero int32 [1]: of static activations. order: int64 [K]; the input is taken
in this order, in which the values' columns lie.
"""


@dataclass(frozen=True)
class Plan:
    """config: what the user asked for; None where only a checkpoint's own quantization holds.

    schemes: of weights that the checkpoint has quantized already, by their names before any fusing;
    with such a checkpoint no other weight is touched. given: parts by name ("W.values"): those of
    the checkpoint, for all weights in schemes, and those that calibration made, for weights by
    their names in the graph. What is not given is made by recipe, rounding to nearest. samples: the
    token ids that calibration ran on.
    """

    config: QuantizationConfig | None = None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Sequence[Sequence[int]] = ()
