"""Mixture-of-experts layers: transformers' registry, answered with one `inlay.experts` call.

What an experts module computes is read off the module, not off its model's name: layout from its
flags and shapes, activation by evaluating its own gate on sample points and comparing with every
formula the op has, parameterised by the numbers the module holds.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

import inlay.passes.ops  # noqa: F401  (defines torch.ops.inlay)
from inlay.errors import UnsupportedModelError
from inlay.lowering.probe_experts import probe_gate, probe_norm
from inlay.passes.check import relative_rms

EXPERTS = "inlay"
"""The name under which transformers knows our experts function."""

OPTIONS = "_inlay_experts"
"""Attribute of a shell's experts modules: the op's arguments that are not tensors."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative RMS between an experts module's own loop and the op: its dtype's rounding, no more.
A swapped or misread part differs by more than 0.1."""


def register_experts() -> None:
    """Make `experts_implementation="inlay"` known to transformers; call it before building."""
    if EXPERTS not in ExpertsInterface().valid_keys():
        ExpertsInterface.register(EXPERTS, _experts_forward)


@torch.no_grad()
def read_experts(model: torch.nn.Module) -> list[str]:
    """Prepare each experts module of a shell for export; returns their names.

    The shell has its real tensors and was built with `experts_implementation=EXPERTS`. Modules
    that transformers dispatches are read; those with a loop of their own over the same tensors
    are read, compared with that loop, and their forward replaced.

    Raises:
        UnsupportedModelError: a module computes what the op cannot; says which part.
    """
    names = []
    for name, module in model.named_modules():
        dispatched, looped = is_dispatched(module), _is_looped(module)
        if not dispatched and not looped:
            continue
        setattr(module, OPTIONS, _read(name, module))
        if looped:
            _check_loop(name, module)
            module.forward = partial(_experts_forward, module)
        names.append(name)
    return names


def is_dispatched(module: torch.nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` wraps the module."""
    return hasattr(module, "is_transposed") and hasattr(type(module), "_apply_gate")


def _is_looped(module: torch.nn.Module) -> bool:
    """Whether the module holds fused experts and is called as those of the interface are."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if is_dispatched(module) or not all(isinstance(w, Tensor) and w.dim() == 3 for w in weights):
        return False
    return len(inspect.signature(type(module).forward).parameters) == 4


def _read(name: str, module: Any) -> dict[str, Any]:
    gated = bool(getattr(module, "has_gate", True))
    up, down = module.gate_up_proj if gated else module.up_proj, module.down_proj
    transposed = bool(getattr(module, "is_transposed", False))
    hidden, inner = (down.shape[2], down.shape[1]) if transposed else down.shape[1:]
    width = 2 * inner if gated else inner
    expected = (down.shape[0], *((hidden, width) if transposed else (width, hidden)))
    if tuple(up.shape) != expected:
        raise UnsupportedModelError(
            f"{_where(name, module)}: its input projection is {list(up.shape)}, which does not "
            f"fit its output projection {list(down.shape)}; expected {list(expected)}"
        )
    options: dict[str, Any] = {"gated": gated, "transposed": transposed}
    found = probe_gate(module, gated, inner)
    if found is None:
        raise UnsupportedModelError(
            f"{_where(name, module)}: its gate ({type(getattr(module, 'act_fn', None)).__name__}) "
            "is none of act(gate) * up with silu, gelu, relu, relu2, sigmoid, tanh or linear, "
            "clamped, soft-capped or offset by numbers that the module holds"
        )
    options |= found
    if getattr(module, "has_post_expert_norm", False):
        eps = probe_norm(module.post_expert_norm, hidden)
        if eps is None:
            raise UnsupportedModelError(
                f"{_where(name, module)}: its post_expert_norm "
                f"({type(module.post_expert_norm).__name__}) is not x (1 + weight), divided by "
                "its root mean square"
            )
        options["norm_eps"] = eps
    return options


def _check_loop(name: str, module: Any) -> None:
    """A module outside the registry has no flags: believe its numbers only."""
    generator = torch.Generator().manual_seed(0)
    weight = module.down_proj
    num_experts, hidden = weight.shape[0], weight.shape[1]
    x = torch.randn(12, hidden, generator=generator).to(weight)
    index = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in x])
    weights = torch.rand(index.shape, generator=generator).to(weight)
    ours = _experts_forward(module, x, index, weights)
    error = relative_rms(module(x, index, weights).float(), ours.float())
    if not error < TOLERANCE[weight.dtype]:
        raise UnsupportedModelError(
            f"{_where(name, module)} loops over its experts itself, which cannot be exported, and "
            f"does not compute what its tensors suggest (relative error {error:.1e}): expected "
            "gate_up_proj [E, 2I, H], down_proj [E, H, I] and a weighted sum of their outputs"
        )


def _where(name: str, module: torch.nn.Module) -> str:
    kind = type(module)
    return f"experts module {name} ({kind.__module__}.{kind.__name__})"


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The registry's signature: hidden_states [..., H], the routing [T, K]."""
    options = getattr(module, OPTIONS, None)
    assert options is not None, "read_experts() must see a shell before it is exported"
    gated = options["gated"]
    bias = bool(getattr(module, "has_bias", False))
    norm = getattr(module, "has_post_expert_norm", False)
    rows = hidden_states if hidden_states.dim() == 2 else hidden_states.flatten(0, -2)
    out = torch.ops.inlay.experts(
        rows,
        top_k_index,
        top_k_weights,
        module.gate_up_proj if gated else module.up_proj,
        module.down_proj,
        (module.gate_up_proj_bias if gated else module.up_proj_bias) if bias else None,
        module.down_proj_bias if bias else None,
        module.post_expert_norm.weight if norm else None,
        **options,
    )
    return out if hidden_states.dim() == 2 else out.view(hidden_states.shape)
