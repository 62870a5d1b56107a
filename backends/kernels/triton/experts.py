"""Mixtures of experts on CUDA: `inlay::experts` and `inlay::quantized_experts`.

    sort the pairs (token, expert) by expert -> [quantize x] -> up, a product with each pair's
    expert's weight -> activation [and quantization] -> down, back in the tokens' order -> sum

Five launches, or six, whatever the router chose; the launches' sizes are upper bounds. Products
have the rounding of the reference: to x's dtype before biases are added, the rest in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from inlay.backends.kernels.triton.launch import Launch, Target, next_power_of_2, target_of
from inlay.backends.kernels.triton.linear import are_groups_served, device_name
from inlay.backends.kernels.triton.moe import (
    activate_kernel,
    combine_kernel,
    quantize_kernel,
    sort_kernel,
)
from inlay.backends.kernels.triton.products import FP8, Product, Routing, plan
from inlay.passes import experts_op, quantized_ops

Weight = tuple[Tensor, Tensor | None, Tensor | None]
"""Numbers [E, N, K], scales and zeros [E, G, N]."""
NARROW = {"int8": torch.int8, "fp8": FP8}
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def experts(*args: Any, **kwargs: Any) -> Tensor:
    """Arguments as those of the op's reference."""
    given = _bind(experts_op.experts, args, kwargs)
    if given["x"].dtype == torch.float64:
        return experts_op.experts(*args, **kwargs)
    up, down = given["up"], given["down"]
    if given["transposed"]:
        up, down = up.mT, down.mT
    return _mixture(given, ((up, None, None), (down, None, None)), "none")


def quantized_experts(*args: Any, **kwargs: Any) -> Tensor:
    """Arguments as those of the op's reference."""
    given = _bind(quantized_ops.quantized_experts, args, kwargs)
    up, down = (
        (given[name], given[f"{name}_scale"], given[f"{name}_zero"]) for name in ("up", "down")
    )
    served = all(
        are_groups_served(
            weight.shape[2] * (2 if weight.dtype == torch.uint8 else 1), len(scale[0])
        )
        for weight, scale, _ in (up, down)
    )
    if given["x"].dtype == torch.float64 or not served:
        return quantized_ops.quantized_experts(*args, **kwargs)
    return _mixture(given, (up, down), given["activations"])


def _bind(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _mixture(given: dict[str, Any], weights: tuple[Weight, Weight], activations: str) -> Tensor:
    x = given["x"]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    if given["top_k_index"].shape[1] == 0:
        return out.zero_()
    routed = x, given["top_k_index"].contiguous(), given["top_k_weights"].contiguous()
    extras = given["up_bias"], given["down_bias"], given["norm_weight"]
    target, name = target_of(x.device), device_name(x.device)
    for launch in plan_mixture(*routed, weights, activations, extras, given, out, target, name):
        launch.run()
    return out


def plan_mixture(
    x: Tensor,
    index: Tensor,
    token_weights: Tensor,
    weights: tuple[Weight, Weight],
    activations: str,
    extras: tuple[Tensor | None, ...],
    options: dict[str, Any],
    out: Tensor,
    target: Target,
    device_name: str = "",
) -> list[Launch]:
    """The launches in their order; memory for all of them is allocated here."""
    (up, up_scale, up_zero), (down, down_scale, down_zero) = weights
    up_bias, down_bias, norm_weight = extras
    pairs, num_experts, top_k = index.numel(), up.shape[0], index.shape[1]
    order = index.new_empty(pairs, dtype=torch.int32)
    offsets = index.new_empty(num_experts + 1, dtype=torch.int32)
    sort = {"index": index, "order": order, "offsets": offsets, "num_pairs": pairs}
    sort |= {"num_experts": num_experts, "BLOCK": 1024}
    launches = [Launch(sort_kernel, (num_experts,), sort, 4, 2)]

    rows, row_scales = x if x.stride(1) == 1 else x.contiguous(), None
    if activations != "none":
        rows, row_scales, launch = _plan_quantize(rows, activations)
        launches.append(launch)
    hidden = x.new_empty(pairs, up.shape[1])
    routing = Routing(order, offsets, top_k, scatter=False)
    # Rows of x that several places share are looked up by row: their scales go along.
    first = Product(rows, up, hidden, row_scales, None, up_scale, up_zero, routing=routing)
    launches.append(plan(first, target, device_name))

    active, active_scales, launch = _plan_activate(
        hidden, order, offsets, index, up_bias, num_experts, activations, options
    )
    launches.append(launch)
    parts = x.new_empty(pairs, out.shape[1])
    routing = Routing(order, offsets, 0, scatter=True)
    second = Product(
        active, down, parts, active_scales, None, down_scale, down_zero, routing=routing
    )
    launches.append(plan(second, target, device_name))
    combine = {
        "parts": parts,
        "index": index,
        "weights": token_weights,
        "bias": out if down_bias is None else down_bias,
        "norm_weight": out if norm_weight is None else norm_weight,
        "out": out,
        "num_experts": num_experts,
        "width": out.shape[1],
        "norm_eps": float(options["norm_eps"]),
        "TOP_K": top_k,
        "HAS_BIAS": down_bias is not None,
        "HAS_NORM": norm_weight is not None,
        "BLOCK": next_power_of_2(out.shape[1]),
    }
    return [*launches, Launch(combine_kernel, (len(out),), combine, 8, 2)]


def _plan_quantize(x: Tensor, activations: str) -> tuple[Tensor, Tensor, Launch]:
    q = torch.empty(x.shape, dtype=NARROW[activations], device=x.device)
    scales = x.new_empty(len(x), 1, dtype=torch.float32)
    args = {"x": x, "q": _bits(q), "scales": scales, "stride": x.stride(0), "width": x.shape[1]}
    args |= {"QUANTIZED": activations, "BLOCK": next_power_of_2(x.shape[1])}
    return q, scales, Launch(quantize_kernel, (len(x),), args, 8, 2)


def _bits(q: Tensor) -> Tensor:
    return q.view(torch.uint8) if q.dtype == FP8 else q


def _plan_activate(
    hidden: Tensor,
    order: Tensor,
    offsets: Tensor,
    index: Tensor,
    bias: Tensor | None,
    num_experts: int,
    activations: str,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Launch]:
    gated, gate_limit = options["gated"], float(options["gate_limit"])
    width = hidden.shape[1] // (2 if gated else 1)
    narrow = activations != "none"
    out = torch.empty(
        len(hidden), width, dtype=NARROW.get(activations, hidden.dtype), device=hidden.device
    )
    scales = hidden.new_empty(len(hidden), 1, dtype=torch.float32) if narrow else None
    args = {
        "hidden": hidden,
        "out": _bits(out),
        "scales": out if scales is None else scales,
        "bias": hidden if bias is None else bias,
        "order": order,
        "offsets": offsets,
        "index": index,
        "width": width,
        "alpha": float(options["alpha"]),
        "gate_limit": gate_limit,
        "up_limit": float(options["up_limit"]),
        "up_offset": float(options["up_offset"]),
        "gate_softcap": float(options["gate_softcap"]),
        "up_softcap": float(options["up_softcap"]),
        "ACTIVATION": options["activation"],
        "GATED": gated,
        "INTERLEAVED": gated and options["interleaved"],
        "HAS_BIAS": bias is not None,
        "HAS_GATE_LIMIT": gate_limit > 0,
        "LIMIT_ACTIVATED": options["limit_activated"],
        "HAS_UP_LIMIT": options["up_limit"] > 0,
        "HAS_GATE_CAP": options["gate_softcap"] > 0,
        "HAS_UP_CAP": options["up_softcap"] > 0,
        "QUANTIZED": activations,
        "ROUND_TO": _TYPES[hidden.dtype],
        "LAST": num_experts,
        "BLOCK": next_power_of_2(width),
    }
    return out, scales, Launch(activate_kernel, (len(hidden),), args, 8, 2)
