"""Checkpoints of compressed-tensors, which LLM Compressor writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.errors import ModelLoadError
from inlay.lowering.quantized_checkpoint.format import (
    DYNAMIC_PER_TENSOR,
    FLOATS,
    INTEGERS,
    Facts,
    Format,
    block_scales,
    check_choice,
    check_scales,
    check_shape,
    check_type,
    one_number,
    refused,
)
from inlay.lowering.quantized_checkpoint.layer import Stored, signed, unpack
from inlay.passes.quantize.config import Scheme

FORMATS = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
)
WEIGHTS = ("4-bit int", "8-bit int", "8-bit float")


class CompressedTensors(Format):
    """weight int8 or float8_e4m3fn [N, K]; or weight_packed int32 [N, K * bits / 32], numbers of
    neighbouring inputs in a word, the first in its lowest bits, 2 ** (bits - 1) added, and
    weight_shape. weight_scale [1], [N, 1], [N, G] or of blocks; weight_zero_point alike, of packed
    weights packed along N. A weight is (number - zero) * scale. weight_g_idx [K]: groups by
    importance. input_scale and input_zero_point [1]: of static activations.

    config_groups say which modules have which of these, the most specific target first: a name, a
    pattern "re:...", a class.
    """

    name = "compressed-tensors"
    main = ("weight_packed", "weight")
    parts = (
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
    )
    required = ("weight_scale",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        for name in ("transform_config", "sparsity_config"):
            inner = facts.get(name) or {}
            if inner and inner.get("format") != "dense":
                raise refused(f"compressed-tensors checkpoints with a {name} are not supported")
        groups = facts.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise refused("compressed-tensors checkpoints without config_groups are not supported")
        self._groups: list[Facts] = []
        for name, group in groups.items():
            if not isinstance(group, Mapping) or not group.get("weights"):
                raise refused(f"compressed-tensors group {name!r} has no weights, or is a preset")
            layout = group.get("format") or facts.get("format")
            check_choice(f"compressed-tensors group {name!r} of format", layout, FORMATS)
            check_choice("weights of", _kind(group["weights"]), WEIGHTS)
            if group.get("output_activations"):
                raise refused(f"compressed-tensors group {name!r} has output_activations")
            self._groups.append(group)
            self.schemes += _dynamic(group)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> Stored:
        group = self._group_of(module)
        weights = group["weights"]
        stored = self._numbers(module, tensors, weights)
        strategy = weights.get("strategy") or _strategy(weights)
        scale, name = tensors["weight_scale"], f"{module}.weight_scale"
        check_type(name, scale, *FLOATS)
        rows, size = stored.numbers.shape
        if strategy == "block":
            block = weights["block_structure"]
            block = [int(n) for n in block.split("x")] if isinstance(block, str) else block
            stored.scales = block_scales(name, scale, stored.numbers.shape, (block[0], block[1]))
            stored.group_size = block[1]
        elif strategy == "tensor":
            stored.scales, stored.per_tensor = one_number(name, scale).expand(1, rows), True
        else:
            check_choice(f"weights of {module} by", strategy, ("channel", "group"))
            stored.group_size = int(weights["group_size"]) if strategy == "group" else 0
            groups = -(-size // (stored.group_size or size))
            scale = scale.reshape(-1, 1) if scale.dim() == 1 else scale
            check_shape(name, scale, (rows, groups))
            stored.scales, stored.groups = scale.t(), tensors.get("weight_g_idx")
        if not weights.get("symmetric", True):
            stored.zeros = self._zeros(module, tensors, weights, stored)
        self._activations(module, tensors, group.get("input_activations"), stored)
        return stored

    def _group_of(self, module: str) -> Facts:
        """The settings of a module, which must have some: its tensors are quantized."""
        ignored = self.facts.get("ignore") or ()
        ranked = [
            (rank, group)
            for group in self._groups
            for target in group.get("targets") or ("Linear",)
            if (rank := _matches(module, target)) is not None
        ]
        if not ranked or any(_matches(module, one) in (0, 1) for one in ignored):
            raise ModelLoadError(
                f"module {module} holds quantized tensors, and the config's groups and ignore list "
                f"say that it has none (targets {[group.get('targets') for group in self._groups]})"
            )
        return min(ranked, key=lambda one: one[0])[1]

    def _numbers(self, module: str, tensors: Mapping[str, Tensor], weights: Facts) -> Stored:
        bits, scale = int(weights["num_bits"]), tensors["weight_scale"]
        packed = tensors.get("weight_packed")
        if packed is not None:
            if "weight_shape" not in tensors:
                raise ModelLoadError(f"tensor {module}.weight_shape is missing")
            check_shape(f"{module}.weight_shape", tensors["weight_shape"], (2,))
            rows, size = (int(n) for n in tensors["weight_shape"])
            check_type(f"{module}.weight_packed", packed, torch.int32)
            check_shape(f"{module}.weight_packed", packed, (rows, -(-size * bits // 32)))
            return Stored(signed(unpack(packed, bits)[:, :size], bits), scale)
        weight, is_float = tensors["weight"], weights.get("type") == "float"
        check_type(f"{module}.weight", weight, torch.float8_e4m3fn if is_float else torch.int8)
        if weight.dim() != 2:
            raise ModelLoadError(f"tensor {module}.weight is {list(weight.shape)}, expected [N, K]")
        return Stored((weight + 8).view(torch.uint8) if bits == 4 else weight, scale)

    def _zeros(
        self, module: str, tensors: Mapping[str, Tensor], weights: Facts, stored: Stored
    ) -> Tensor:
        name, bits = f"{module}.weight_zero_point", int(weights["num_bits"])
        zeros = tensors.get("weight_zero_point")
        if zeros is None:
            raise ModelLoadError(f"tensor {name} is missing, and the weights are not symmetric")
        groups, rows = stored.scales.shape
        if zeros.dtype == torch.int32 and "weight_packed" in tensors:
            check_shape(name, zeros, (-(-rows * bits // 32), groups))
            return signed(unpack(zeros.t(), bits)[:, :rows], bits)
        check_type(name, zeros, torch.int8)
        zeros = zeros.reshape(-1, groups).expand(rows, groups).t()
        return (zeros + 8).view(torch.uint8) if bits == 4 else zeros

    def _activations(
        self, module: str, tensors: Mapping[str, Tensor], inputs: Any, stored: Stored
    ) -> None:
        """Fill in how inputs are rounded, where an op of ours does that to such weights."""
        if not inputs:
            return
        kind, strategy = _kind(inputs), inputs.get("strategy") or _strategy(inputs)
        plain = stored.zeros is None and stored.groups is None
        one_scale = plain and stored.group_size in (0, stored.numbers.shape[1])
        fits = {"int8": kind == "8-bit int" and one_scale, "fp8": kind == "8-bit float"}
        if not fits.get(stored.kind, False):
            self.notes.add(
                f"{kind} activations of {_kind_of(stored)} weights are not rounded: more exact"
            )
            return
        stored.activation = stored.kind
        stored.activation_symmetric = bool(inputs.get("symmetric", True))
        if inputs.get("dynamic"):
            check_choice(f"activations of {module} by", strategy, ("token", "tensor", "group"))
            if strategy == "tensor":
                self.notes.add(DYNAMIC_PER_TENSOR)
            if strategy == "group" and stored.group_size != inputs.get("group_size"):
                self.notes.add("activation scales are of as many inputs as weight scales are")
            return
        check_choice(f"static activations of {module} by", strategy, ("tensor",))
        if "input_scale" not in tensors:
            raise ModelLoadError(f"tensor {module}.input_scale is missing")
        name = f"{module}.input_scale"
        check_type(name, tensors["input_scale"], *FLOATS)
        stored.input_scale = check_scales(name, one_number(name, tensors["input_scale"]).float())
        if not stored.activation_symmetric:
            if "input_zero_point" not in tensors:
                raise ModelLoadError(f"tensor {module}.input_zero_point is missing")
            zero = one_number(f"{module}.input_zero_point", tensors["input_zero_point"])
            check_type(f"{module}.input_zero_point", zero, torch.int8, *INTEGERS)
            if not -128 <= int(zero) <= 127:
                raise ModelLoadError(
                    f"tensor {module}.input_zero_point is {int(zero)}, expected -128 to 127"
                )
            stored.input_zero = zero.to(torch.int32)


def _kind(settings: Facts) -> str:
    return f"{settings.get('num_bits', 8)}-bit {settings.get('type', 'int')}"


def _kind_of(stored: Stored) -> str:
    what = stored.kind if stored.zeros is None else f"{stored.kind} zero-point"
    return what if stored.group_size == 0 else f"{what} groups of {stored.group_size}"


def _dynamic(group: Facts) -> tuple[Scheme, ...]:
    """See `Format.schemes`, and for which of them activations are rounded `_activations`."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    if not inputs.get("dynamic") or _kind(weights) != _kind(inputs):
        return ()
    if _kind(inputs) == "8-bit float":
        return (Scheme("fp8", "fp8"),)
    by = weights.get("strategy") or _strategy(weights)
    plain = weights.get("symmetric", True) and not weights.get("actorder")
    is_rounded = _kind(inputs) == "8-bit int" and plain and by in ("tensor", "channel")
    return (Scheme("int8", "int8"),) if is_rounded else ()


def _strategy(settings: Facts) -> str:
    """What a config without one means, by its group_size."""
    size = settings.get("group_size")
    return "tensor" if size is None else "group" if int(size) > 0 else "channel"


def _matches(module: str, target: str) -> int | None:
    """How specific a target is that means this module: 0 its name, 1 a pattern, 2 its class."""
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    if target == module:
        return 0
    kind = "Embedding" if re.search(r"(embed|wte)\w*$", module) else "Linear"
    return 2 if target == kind else None
