"""`inlay::experts`: a mixture-of-experts layer after its router, as one op.

Every layout and activation that transformers' experts have is an argument, so that one reference
and one kernel serve all of them. With a gate, an expert computes

    down(act(gate(x)) * (up(x) + up_offset)),   gate and up being the halves of one matrix

and without one down(act(up(x))).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.passes.ops import REFERENCES

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # x sigmoid(alpha x), see activate()
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


def activate(
    gate: Tensor,
    activation: str,
    alpha: float = 1.0,
    limit: float = 0.0,
    limit_activated: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """The gate's activation, element by element; arguments as those of `experts`."""
    if limit > 0 and not limit_activated:
        gate = gate.clamp(max=limit)
    if activation == "silu" and (alpha != 1.0 or softcap > 0):
        linear = torch.tanh(gate / softcap) * softcap if softcap > 0 else gate
        active = linear * torch.sigmoid(alpha * gate)
    else:
        active = ACTIVATIONS[activation](gate)
    return active.clamp(max=limit) if limit > 0 and limit_activated else active


def bound_up(up: Tensor, limit: float = 0.0, offset: float = 0.0, softcap: float = 0.0) -> Tensor:
    """What the activated gate is multiplied with; arguments as those of `experts`."""
    if limit > 0:
        up = up.clamp(min=-limit, max=limit)
    if softcap > 0:
        up = torch.tanh(up / softcap) * softcap
    return up + offset if offset else up


def experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    alpha: float = 1.0,
    gate_limit: float = 0.0,
    up_limit: float = 0.0,
    limit_activated: bool = False,
    up_offset: float = 0.0,
    gate_softcap: float = 0.0,
    up_softcap: float = 0.0,
    norm_eps: float = 0.0,
) -> Tensor:
    """Each token's weighted sum over its experts (Shazeer et al., 2017): [T, H].

    x [T, H]; top_k_index [T, K] int64, where anything outside 0..E-1 is no expert (padding, or an
    expert that another device holds); top_k_weights [T, K] in any float dtype.
    up [E, 2I, H] ([E, I, H] without a gate), down [E, H, I], or with their last two dimensions
    swapped where transposed; up_bias [E, 2I], down_bias [E, H]. gated: up holds gate and up, the
    gate first, or in turns where interleaved.
    activation: a name in ACTIVATIONS; silu is x sigmoid(alpha x), its first factor bounded by
    gate_softcap. gate_limit: upper bound of the gate, or of its activation where limit_activated.
    up_limit: bound of up's magnitude. softcaps: s -> softcap tanh(s / softcap). 0 for none of
    these. norm_weight [H]: each expert's output is scaled by 1 + norm_weight and divided by its
    root mean square over H, norm_eps added to the mean.

    Matrix products are in x's dtype, all between and after them in float32 (float64 for float64),
    rounded once: transformers' default sums so; its eager loop rounds after every addition.
    """
    options = activation, gated, interleaved, alpha, gate_limit, up_limit, limit_activated
    bounds = up_offset, gate_softcap, up_softcap, norm_eps
    return mixture(
        x,
        top_k_index,
        top_k_weights,
        up.shape[0],
        lambda rows, expert: _product(rows, up[expert], transposed),
        lambda rows, expert: _product(rows, down[expert], transposed),
        up_bias,
        down_bias,
        norm_weight,
        *options,
        *bounds,
    )


def mixture(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    up: Callable[[Tensor, int], Tensor],
    down: Callable[[Tensor, int], Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    norm_weight: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    gate_limit: float,
    up_limit: float,
    limit_activated: bool,
    up_offset: float,
    gate_softcap: float,
    up_softcap: float,
    norm_eps: float,
) -> Tensor:
    """The layer over any products: up and down take rows [n, K] and an expert to [n, N]; the rest
    as those of `experts`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_zeros((*top_k_index.shape, x.shape[1]), dtype=wide)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < num_experts:
            continue
        token, slot = torch.where(top_k_index == expert)
        hidden = _biased(up(x[token], expert), up_bias, expert)
        gate, factor = _split(hidden, interleaved) if gated else (hidden, None)
        active = activate(gate, activation, alpha, gate_limit, limit_activated, gate_softcap)
        if factor is not None:
            active = active * bound_up(factor, up_limit, up_offset, up_softcap)
        out = _biased(down(active.to(x.dtype), expert), down_bias, expert)
        if norm_weight is not None:
            out = out * (1.0 + norm_weight.to(wide))
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + norm_eps)
        parts[token, slot] = out * top_k_weights[token, slot, None].to(wide)
    return parts.sum(dim=1).to(x.dtype)


def _split(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[:, ::2], gate_up[:, 1::2]
    half = gate_up.shape[1] // 2
    return gate_up[:, :half], gate_up[:, half:]


def _product(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """One expert's linear layer: rows [n, K] to [n, N]."""
    return F.linear(rows, weight.t() if transposed else weight)


def _biased(out: Tensor, biases: Tensor | None, expert: int) -> Tensor:
    """A product's result, widened, with its expert's bias."""
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return out if biases is None else out + biases[expert].to(out.dtype)


_op = torch.library.custom_op("inlay::experts", experts, mutates_args=())
REFERENCES[torch.ops.inlay.experts.default] = experts


@_op.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
