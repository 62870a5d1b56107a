"""Which of the op's formulas an experts module's gate is: found by evaluating it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.passes.experts_op import ACTIVATIONS, activate, bound_up

SILU_SLOPES = (1.0, 1.702)
"""Slopes that classes write as literals: SiLU's own and QuickGELU's."""

NUM_POINTS = 2048
NUM_SIFTED = 64
"""Points that every pair of candidates is tried on, before the survivors see all."""

TOLERANCE = 1e-5
"""Of the magnitude: some gates compute in float32 whatever they are given."""

Options = dict[str, Any]


def probe_gate(module: Any, gated: bool, inner: int) -> Options | None:
    """The op's activation arguments that reproduce `_apply_gate`, or `act_fn` without a gate.

    inner: the experts' width I. The simplest match wins; None where nothing matches.
    """
    numbers = _numbers(module)
    x = _samples(numbers, 2 * inner if gated else inner)
    result = _evaluate(module, gated, x)
    for interleaved in (False, True) if gated else (False,):
        if interleaved:
            gate, up = x[:, ::2], x[:, 1::2]
        else:
            gate, up = x.chunk(2, dim=-1) if gated else (x, None)
        found = _match(gate, up, result, numbers)
        if found is not None:
            return {**found, "interleaved": interleaved}
    return None


def _evaluate(module: Any, gated: bool, x: Tensor) -> Tensor:
    if not gated:
        return module.act_fn(x)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(x)
    gate, up = x.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _match(gate: Tensor, up: Tensor | None, result: Tensor, numbers: list[float]) -> Options | None:
    gate, result = gate.flatten(), result.flatten().to(gate.dtype)
    gates = list(_gates(numbers))
    factors: list[tuple[Options, Callable[[Tensor], Tensor]]] = [({}, torch.ones_like)]
    if up is not None:
        up, factors = up.flatten(), list(_factors(numbers))
    other = gate if up is None else up
    few = slice(NUM_SIFTED)
    left = torch.stack([run(gate[few]) for _, run in gates])
    right = torch.stack([run(other[few]) for _, run in factors])
    fits = _close(left[:, None] * right[None], result[few]).all(-1)
    for i, j in fits.nonzero().tolist():
        if _close(gates[i][1](gate) * factors[j][1](other), result).all():
            return {**gates[i][0], **factors[j][0]}
    return None


def _close(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours - theirs).abs() <= TOLERANCE * (1.0 + theirs.abs())


def _gates(numbers: list[float]) -> Iterator[tuple[Options, Callable[[Tensor], Tensor]]]:
    """Candidates for the activated gate, the simplest first."""
    slopes = dict.fromkeys((*SILU_SLOPES, *numbers))
    bounds: list[Options] = [{}]
    bounds += [
        {"gate_limit": n, "limit_activated": after} for n in numbers for after in (False, True)
    ]
    for bound, name in itertools.product(bounds, ACTIVATIONS):
        for alpha in slopes if name == "silu" else (1.0,):
            yield _gate({"activation": name, "alpha": alpha, **bound})
    for cap in numbers:
        yield _gate({"activation": "silu", "alpha": 1.0, "gate_softcap": cap})


def _gate(options: Options) -> tuple[Options, Callable[[Tensor], Tensor]]:
    short = {name.removeprefix("gate_"): value for name, value in options.items()}
    return options, lambda x: activate(x, **short)


def _factors(numbers: list[float]) -> Iterator[tuple[Options, Callable[[Tensor], Tensor]]]:
    """Candidates for what the gate is multiplied with."""
    bounds: list[Options] = [{}]
    bounds += [{name: n} for n in numbers for name in ("up_limit", "up_softcap")]
    for bound, offset in itertools.product(bounds, (0.0, 1.0)):
        yield _factor({**bound, "up_offset": offset})


def _factor(options: Options) -> tuple[Options, Callable[[Tensor], Tensor]]:
    short = {name.removeprefix("up_"): value for name, value in options.items()}
    return options, lambda x: bound_up(x, **short)


def _numbers(module: torch.nn.Module) -> list[float]:
    """Positive numbers among the attributes and one-element tensors of a module and its parts."""
    found: dict[float, None] = {}
    for part in module.modules():
        values = [*vars(part).values(), *part._parameters.values(), *part._buffers.values()]
        for value in values:
            if isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta":
                value = value.item()
            if isinstance(value, int | float) and not isinstance(value, bool):
                number = float(value)
                if math.isfinite(number) and number > 0:
                    found[number] = None
    return list(found)


def _samples(numbers: list[float], width: int) -> Tensor:
    """Points around zero and on both sides of every number, in random order: [rows, width]."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([n * f for n in numbers for f in (0.5, 0.9, 1.1, 2.0)])
    near = torch.randn(max(16, 3 * len(edges)), generator=generator) * 3.0
    pool = torch.cat([near, edges, -edges]).double()
    rows = max(1, -(-2 * NUM_POINTS // width))
    return pool[torch.randint(len(pool), (rows, width), generator=generator)]


def probe_norm(norm: torch.nn.Module, hidden: int) -> float | None:
    """The epsilon with which a norm is x (1 + weight) over its root mean square, if it is."""
    weight = norm.weight.detach().double() if isinstance(norm.weight, Tensor) else None
    if weight is None or weight.shape != (hidden,):
        return None
    generator = torch.Generator().manual_seed(0)
    # Small enough for the epsilon to show, and large enough for the rest to.
    x = torch.randn(8, hidden, generator=generator).double() * torch.logspace(-4, 1, 8)[:, None]
    theirs = copy.deepcopy(norm).double()(x)
    scaled = x * (1.0 + weight)
    for eps in _numbers(norm):
        ours = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps)
        if _close(ours, theirs).all():
            return eps
    return None
