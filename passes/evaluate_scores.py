"""Numbers for the part of a plain graph that depends on positions alone: masks and biases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inlay.passes.attention_mask import NotExpressible, check_same_form
from inlay.passes.graph import bind, fake, is_call

aten = torch.ops.aten
LEARNED = (torch.ops.inlay.linear.default, aten.linear.default, aten.embedding.default)
"""What makes activations: a mask that comes from one of them is not a function of positions."""

SHAPE_ONLY = (
    aten.sym_size.int,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)
"""What asks for a tensor's shape and not for its numbers."""

NARROW = (torch.bfloat16, torch.float16, torch.float32)


def positions_of(gm: GraphModule) -> Node:
    """The placeholder of the positions [1, T]."""
    found = [n for n in gm.graph.nodes if n.meta.get("input") == "position_ids"]
    assert found, "a captured graph has position_ids"
    return found[0]


class Evaluator:
    """Values of position-only nodes for one request, in float64."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.size = str(fake(positions_of(gm)).shape[1])

    def __call__(
        self, node: Node, num_tokens: int, product: Node | None = None, value: Tensor | None = None
    ) -> Tensor:
        """node's value where the product of queries and keys has this value: one number for all
        its elements, or one for each.

        Raises NotExpressible where anything but positions decides.
        """
        values: dict[Node, Any] = {}
        of_tokens: set[Node] = set()
        for each in _in_order(node, product):
            asked = not of_tokens.isdisjoint(_sources(each, product))
            asked = asked and not is_call(each, *SHAPE_ONLY)
            if asked or each.meta.get("input", "position_ids") != "position_ids":
                of_tokens.add(each)
            if each is product:
                assert value is not None
                values[each] = self._product(each, num_tokens, value, values)
            elif each.op == "placeholder":
                values[each] = self._placeholder(each, num_tokens)
            else:
                values[each] = self._call(each, values)
        if node in of_tokens:
            raise NotExpressible(
                "the mask depends on the tokens themselves, not on positions alone"
            )
        return values[node]

    def check_reach(self, node: Node, num_tokens: int, product: Node | None = None) -> None:
        """Raises NotExpressible where the mask may change beyond the tokens that are tried: a
        window that is longer would be taken for none."""
        longest = self.gm.meta["max_seq_len"]
        for each in _in_order(node, product):
            if "weight" in each.meta and fake(each).dtype == torch.bool and fake(each).dim() >= 2:
                mask = self.gm.meta["constants"](each.meta["weight"])
                check_same_form(mask.reshape(-1, *mask.shape[-2:])[0], num_tokens)
            for number in torch.utils._pytree.tree_leaves(each.args):
                if type(number) in (int, float) and num_tokens < number < longest:
                    raise NotExpressible(
                        f"the mask is made with the number {number}, and {num_tokens} tokens are "
                        "the most that can be tried"
                    )

    def _product(self, node: Node, num_tokens: int, value: Tensor, values: Any) -> Tensor:
        shape = self._shape(node, num_tokens)
        if value.dim() and value.numel() != math.prod(shape):
            raise NotExpressible("heads are added between the product of q and k and the softmax")
        # The chain may write to it.
        filled = value.reshape(shape).clone() if value.dim() else value.expand(shape).clone()
        if not is_call(node, aten.baddbmm.default):
            return filled
        arguments = bind(node)
        return arguments["beta"] * values[node.args[0]] + arguments["alpha"] * filled

    def _placeholder(self, node: Node, num_tokens: int) -> Tensor:
        if node.meta.get("input") == "position_ids":
            return torch.arange(num_tokens)[None]
        if "input" in node.meta:
            return torch.zeros(self._shape(node, num_tokens), dtype=fake(node).dtype)
        return _widen(self.gm.meta["constants"](node.meta["weight"]))

    def _shape(self, node: Node, num_tokens: int) -> list[int]:
        return [num_tokens if str(size) == self.size else int(size) for size in fake(node).shape]

    def _call(self, node: Node, values: dict[Node, Any]) -> Any:
        if is_call(node, *LEARNED):
            raise NotExpressible("the mask depends on activations, not on positions alone")
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        # A model of a narrow dtype rounds masks and biases; the exact form is looked for. What
        # does not depend on tokens (slopes) is of a dtype that its author chose.
        value, target = node.meta["val"], node.target
        assert callable(target), f"{node.name} is not a call"
        if isinstance(value, Tensor) and any(str(size) == self.size for size in value.shape):
            args, kwargs = torch.utils._pytree.tree_map(
                lambda v: torch.float64 if v in NARROW else v, (args, kwargs)
            )
            return _widen(target(*args, **kwargs))
        return target(*args, **kwargs)


def _widen(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.dtype.is_floating_point
    return value.double() if floating else value


def _in_order(node: Node, product: Node | None) -> Iterator[Node]:
    """node and all it is computed from, sources first; not what the product is computed from."""
    done: set[Node] = set()
    stack = [(node, False)]
    while stack:
        each, ready = stack.pop()
        if each in done:
            continue
        if ready:
            done.add(each)
            yield each
            continue
        stack.append((each, True))
        stack.extend((source, False) for source in _sources(each, product))


def _sources(node: Node, product: Node | None) -> list[Node]:
    """What a node is computed from; of the product only what is added to it."""
    if product is None or node is not product:
        return list(node.all_input_nodes)
    added = node.args[0] if is_call(node, aten.baddbmm.default) else None
    return [added] if isinstance(added, Node) else []
