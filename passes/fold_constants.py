"""Constants that need computing once: what weights alone make becomes a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import add_weight, fake, replace, written_nodes
from inlay.passes.weights import encode_argument

SMALL_BYTES = 1 << 20
"""Up to here a weight may be larger than those that it is made of."""


def fold_constants(gm: GraphModule) -> int:
    """Compute when the artifact is built, or refitted, what would be the same at each step.

        scale = exp((q1 * k1).sum(-1)) - exp((q2 * k2).sum(-1))
    ->
        scale: a weight, its recipe being these calls

    Views of weights cost nothing and stay. So does what is made of no weight, like a mask of
    ones: a compiler writes it into its code, where a weight would have to be loaded.
    """
    constants = _constants(gm)
    count = 0
    for node in constants:
        if _is_view(node) or not _is_read(node, constants):
            continue
        steps, leaves = _history(node)
        names = [leaf.meta["weight"] for leaf in leaves]
        if not names or not _is_worth_it(node, leaves, constants):
            continue
        recipe = {"op": "calls", "inputs": names, "calls": _recipe(steps, leaves)}
        weight = add_weight(gm, f"{names[0]}.{node.name}", recipe, fake(node))
        replace(node, weight)
        count += 1
    return count


def _constants(gm: GraphModule) -> dict[Node, None]:
    """Calls of pure ops on weights and constants, in graph order, that nothing writes into."""
    written = written_nodes(gm)
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        known = all(one in found or "weight" in one.meta for one in inputs)
        if known and node not in written and _is_pure(node):
            found[node] = None
    return found


def _is_pure(node: Node) -> bool:
    """Whether a call gives one tensor, the same each time, and is an op of PyTorch itself."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and "empty" not in target._schema.name


def _is_view(node: Node) -> bool:
    """Whether a call's result may share memory with its argument; casts compute."""
    if node.target is torch.ops.aten.to.dtype:
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    return any(returned.alias_info is not None for returned in node.target._schema.returns)


def _is_read(node: Node, constants: dict[Node, None]) -> bool:
    """Whether what is no constant reads a value, or a view of it."""
    return any(
        user not in constants or (_is_view(user) and _is_read(user, constants))
        for user in node.users
    )


def _history(node: Node) -> tuple[list[Node], list[Node]]:
    """The calls that make a value, itself last, and the weights that they start from."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        seen.add(one)
        stack.extend(source for source in one.all_input_nodes if source not in seen)
    ordered = [one for one in node.graph.nodes if one in seen]
    steps = [one for one in ordered if one.op == "call_function"]
    return steps, [one for one in ordered if one.op == "placeholder"]


def _is_worth_it(node: Node, leaves: list[Node], constants: dict[Node, None]) -> bool:
    """Whether the artifact does not grow by it, or by little."""
    freed = [leaf for leaf in leaves if all(user in constants for user in leaf.users)]
    return _num_bytes(node) <= max(SMALL_BYTES, sum(map(_num_bytes, freed)))


def _num_bytes(node: Node) -> int:
    return int(fake(node).numel()) * fake(node).element_size()


def _recipe(steps: list[Node], leaves: list[Node]) -> list[dict[str, Any]]:
    numbers = {node: number for number, node in enumerate([*leaves, *steps])}
    return [
        {
            "op": str(step.target).removeprefix("aten."),
            "args": [encode_argument(arg, numbers) for arg in step.args],
            "kwargs": {key: encode_argument(arg, numbers) for key, arg in step.kwargs.items()},
        }
        for step in steps
    ]
