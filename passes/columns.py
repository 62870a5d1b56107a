"""What each column of a tensor is made of, so that one rule sees through every way to write it.

Slices, halves, pairs, concatenations and repetitions move columns of the last dimension about;
negation, products and sums combine them. A column is a sum of signed products of *keys*; a key
names a column of a tensor that is not looked into: (node, index), or (node, key) where the node
computes each of its columns from the same column of another tensor, all in the same way.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from inlay.passes.graph import bind, fake, is_call, same_shape

aten = torch.ops.aten

Key = tuple[Node, Any]
Term = tuple[int, tuple[Key, ...]]
Column = tuple[Term, ...]
"""Signed products, summed."""

SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
PER_COLUMN = (aten.cos.default, aten.sin.default, aten.to.dtype)
PER_ROW = (aten.unsqueeze.default, aten.select.int, aten.slice.Tensor)
"""Ops that leave the columns where they are if their dimension is not the last one."""


class Columns:
    """The columns of the tensors of a graph, as far as they were asked for.

    nodes: the keys of all columns of a tensor -> the tensor, for those that were looked into.
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[Key, ...], Node] = {}
        self._known: dict[Node, tuple[Column, ...]] = {}

    def of(self, node: Node) -> tuple[Column, ...]:
        """One entry per column of a tensor whose last dimension has a known size."""
        if node not in self._known:
            columns = self._evaluate(node)
            self._known[node] = columns
            keys = keys_of(columns)
            if keys is not None:
                self.nodes.setdefault(keys, node)
        return self._known[node]

    def factors(self, node: Node) -> tuple[Column, ...]:
        """The same, the tensor not looked into where its columns are sums or products."""
        columns = self.of(node)
        if all(len(column) == 1 and len(column[0][1]) == 1 for column in columns):
            return columns
        leaf = _leaf(node)
        self.nodes.setdefault(tuple((node, index) for index in range(len(leaf))), node)
        return leaf

    def _evaluate(self, node: Node) -> tuple[Column, ...]:
        if not all(_has_known_width(source) for source in node.all_input_nodes):
            return _leaf(node)
        for rule in (self._moved, self._joined, self._combined, self._mapped):
            columns = rule(node)
            if columns is not None:
                return columns
        return _leaf(node)

    def _moved(self, node: Node) -> tuple[Column, ...] | None:
        """Some columns of one tensor."""
        if is_call(node, aten.slice.Tensor) and _is_last(node):
            arguments = bind(node)
            bounds = (arguments["start"], arguments["end"], arguments["step"])
            return self.factors(node.args[0])[slice(*bounds)] if _are_numbers(bounds) else None
        if is_call(node, operator.getitem) and is_call(node.args[0], *SPLITS):
            split, index = node.args
            if not _is_last(split, split.args[0]):
                return None
            sizes = [part.shape[-1] for part in split.meta["val"]]
            return self.factors(split.args[0])[sum(sizes[:index]) :][: sizes[index]]
        if is_call(node, aten.repeat_interleave.self_int) and _is_last(node):
            source, times = self.factors(node.args[0]), node.args[1]
            return tuple(column for column in source for _ in range(times))
        return self._one_of_pairs(node)

    def _one_of_pairs(self, node: Node) -> tuple[Column, ...] | None:
        """x.reshape(..., D // 2, 2)[..., index]."""
        if not is_call(node, aten.select.int) or not _is_last(node, node.args[0]):
            return None
        pairs, _, index = node.args
        if not is_call(pairs, aten.reshape.default) or not isinstance(index, int):
            return None
        source, count = pairs.args[0], fake(pairs).shape[-1]
        split = fake(source).unflatten(-1, (-1, count)) if _splits(source, count) else None
        if split is None or not same_shape(split, fake(pairs)):
            return None
        return self.factors(source)[index::count]

    def _joined(self, node: Node) -> tuple[Column, ...] | None:
        """The columns of several tensors: one after the other, or in turn."""
        if is_call(node, aten.cat.default) and _is_last(node):
            return tuple(column for part in node.args[0] for column in self.of(part))
        if not is_call(node, aten.reshape.default) or not is_call(node.args[0], aten.stack.default):
            return None
        stack = node.args[0]
        parts = stack.args[0]
        if not _is_last(stack, stack) or not same_shape(fake(stack).flatten(-2), fake(node)):
            return None
        return tuple(column for turn in zip(*map(self.of, parts), strict=True) for column in turn)

    def _combined(self, node: Node) -> tuple[Column, ...] | None:
        """Negations, products and sums, column by column."""
        if is_call(node, aten.neg.default):
            columns = self.factors(node.args[0])
            return tuple(_times(-1, column) for column in columns)
        if not is_call(node, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            return None
        left, right = node.args[:2]
        if not isinstance(left, Node) or not isinstance(right, Node):
            return None
        if _width(left) != _width(right):
            return None
        if node.target is aten.mul.Tensor:
            pairs = zip(self.factors(left), self.factors(right), strict=True)
            return tuple(((a[0] * b[0], a[1] + b[1]),) for (a,), (b,) in pairs)
        sign = 1 if node.target is aten.add.Tensor else -1
        summed = zip(self.of(left), self.of(right), strict=True)
        return tuple(a + _times(sign, b) for a, b in summed)

    def _mapped(self, node: Node) -> tuple[Column, ...] | None:
        """What treats all columns alike."""
        scaled = is_call(node, aten.mul.Tensor) and isinstance(node.args[1], int | float)
        shaped = node.args[0] if is_call(node, aten.select.int) else node
        moves_rows = is_call(node, *PER_ROW) and not _is_last(node, shaped)
        repeats_rows = is_call(node, aten.expand.default) and _width(node) == _width(node.args[0])
        if not (scaled or moves_rows or repeats_rows or is_call(node, *PER_COLUMN)):
            return None
        keys = keys_of(self.factors(node.args[0]))
        return None if keys is None else tuple(((1, ((node, key),)),) for key in keys)


def keys_of(columns: tuple[Column, ...]) -> tuple[Key, ...] | None:
    """Each column's key, where each is one column of one tensor as it is."""
    if any(len(column) != 1 or column[0][0] != 1 or len(column[0][1]) != 1 for column in columns):
        return None
    return tuple(column[0][1][0] for column in columns)


def _leaf(node: Node) -> tuple[Column, ...]:
    return tuple(((1, ((node, index),)),) for index in range(_width(node)))


def _width(node: Node) -> int:
    return int(fake(node).shape[-1])


def _times(sign: int, column: Column) -> Column:
    return tuple((sign * s, keys) for s, keys in column)


def _is_last(node: Node, shaped: Node | None = None) -> bool:
    """Whether a call's `dim` is the last one of its result, or of the tensor given."""
    dim = bind(node)["dim"]
    return dim in (-1, fake(shaped or node).dim() - 1)


def _are_numbers(bounds: tuple[Any, ...]) -> bool:
    return all(bound is None or isinstance(bound, int) for bound in bounds)


def _splits(node: Node, count: Any) -> bool:
    size = fake(node).shape[-1]
    return isinstance(size, int) and isinstance(count, int) and size % count == 0


def _has_known_width(node: Node) -> bool:
    """Of a call that splits a tensor, the first part's tells."""
    value = node.meta["val"]
    first = value[0] if isinstance(value, list | tuple) else value
    return isinstance(first, torch.Tensor) and first.dim() > 0 and isinstance(first.shape[-1], int)
