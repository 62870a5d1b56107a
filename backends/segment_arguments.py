"""What stands in for a segment's tensors when it is exported: example values, dynamic sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

MAX_SIZE = 1 << 20
"""Upper bound of every dynamic size, for all engines alike, so that packages can be shared."""

EXAMPLE_SIZES = (64, 32, 16, 8)
"""Distinct sizes for a segment's symbols; compilers take them as hints of what is usual."""


def example_arguments(
    gm: GraphModule, instead: Mapping[int, torch.Tensor] | None = None, device: str = "cpu"
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Example tensors and dynamic shapes for torch.export, from the placeholders' specs.

    instead: by index, tensors of fixed size that some weights are exported as.
    """
    dims: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    arguments: list[torch.Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if instead and index in instead:
            arguments.append(instead[index])
            dynamic.append({})
            continue
        shape, dtype = node.meta["spec"]
        for size in shape:
            if isinstance(size, str) and size not in dims:
                sizes[size] = EXAMPLE_SIZES[len(dims)]
                dims[size] = torch.export.Dim(size, min=2, max=MAX_SIZE)
        concrete = [sizes.get(size, size) for size in shape]
        value = 1 if dtype.is_floating_point else 0
        arguments.append(torch.full(concrete, value, device=device).to(dtype))
        dynamic.append({d: dims[size] for d, size in enumerate(shape) if size in dims})
    return tuple(arguments), tuple(dynamic)
