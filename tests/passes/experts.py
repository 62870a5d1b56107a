"""Arguments for `inlay.experts`, shared by the tests of its reference and of its kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from inlay.passes import experts_op

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"bias": True},
    "transposed": {"transposed": True},
    "interleaved": {"interleaved": True, "transposed": True, "bias": True},
    "ungated": {"gated": False, "activation": "relu2", "bias": True},
    "clamped": {"gate_limit": 0.7, "up_limit": 0.6, "alpha": 1.702, "up_offset": 1.0},
    "clamped_after": {"gate_limit": 0.4, "up_limit": 0.6, "limit_activated": True},
    "softcapped": {"gate_softcap": 1.5, "up_softcap": 0.8},
    "normed": {"norm_eps": 1e-3, "bias": True},
}
"""Layout or gate -> options of `make_experts`: each kind that transformers has, and its parts."""


@dataclass
class Experts:
    """One call's arguments."""

    x: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (
            self.x, self.top_k_index, self.top_k_weights, self.up, self.down,
            self.up_bias, self.down_bias, self.norm_weight,
        )  # fmt: skip

    def reference(self) -> torch.Tensor:
        return experts_op.experts(*self.tensors, **self.options)

    def in_float64(self) -> torch.Tensor:
        """The reference on the same numbers, without any rounding to speak of."""
        index = self.top_k_index
        wide = [t if t is None or t is index else t.double() for t in self.tensors]
        return experts_op.experts(*wide, **self.options)

    def swapped(self) -> Experts:
        """A known-bad twin: gate and up exchanged."""
        dim, interleaved = (2 if self.options.get("transposed") else 1), self.options["interleaved"]
        order = torch.arange(self.up.shape[dim])
        half = len(order) // 2
        order = order.view(-1, 2).flip(1).flatten() if interleaved else order.roll(half)
        bias = None if self.up_bias is None else self.up_bias[:, order]
        return replace(self, up=self.up.index_select(dim, order), up_bias=bias)


def make_experts(
    dtype: torch.dtype = torch.float32,
    num_tokens: int = 9,
    num_experts: int = 7,
    hidden: int = 33,
    inner: int = 19,
    top_k: int = 3,
    bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> Experts:
    """Random arguments of about unit size, so that every bound in LAYOUTS is met.

    The last two experts get no token; of four tokens and more, the second has an expert that is
    not here and the third is padding, with NaN for weights.
    """
    generator = torch.Generator().manual_seed(seed)
    gated = options.get("gated", True)
    width = 2 * inner if gated else inner

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    up, down = randn(num_experts, width, hidden), randn(num_experts, hidden, inner)
    up, down = up / hidden**0.5, down / inner**0.5
    if options.get("transposed"):
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    index = torch.rand(num_tokens, num_experts - 2, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator)
    if num_tokens > 3:
        index[1, 0], index[2], weights[2] = num_experts, -1, float("nan")
    return Experts(
        randn(num_tokens, hidden).to(dtype),
        index,
        weights,
        up.to(dtype),
        down.to(dtype),
        (0.3 * randn(num_experts, width)).to(dtype) if bias else None,
        (0.3 * randn(num_experts, hidden)).to(dtype) if bias else None,
        (0.3 * randn(hidden)).to(dtype) if options.get("norm_eps") else None,
        {"interleaved": False, **options},
    )
