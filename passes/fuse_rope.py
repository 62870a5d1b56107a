"""Rotary position embedding in one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes.columns import Column, Columns, Key
from inlay.passes.graph import calls, fake, insert_call, is_call, refuse, replace, same_shape
from inlay.passes.rewrite_complex import rewrite_complex

aten = torch.ops.aten
ROPE = torch.ops.inlay.rope.default
SUMS = (aten.add.Tensor, aten.sub.Tensor)
JOINS = (aten.cat.default, aten.reshape.default)
NO_PAIRS = "the rotation is not of the halves or pairs of the tensor that is scaled"


@dataclass(frozen=True)
class _Rotation:
    """x and the tables as keys of columns, cos and sin of one angle for each pair of columns."""

    x: tuple[Key, ...]
    cos: tuple[Key, ...]
    sin: tuple[Key, ...]
    interleaved: bool
    negated: bool


def fuse_rope(gm: GraphModule) -> int:
    """Every pair of columns (a, b) of x becomes (a cos - b sin, b cos + a sin).

        x * cos + cat([-second, first], -1) * sin                        # half form
        x * cos + stack([-odd, even], -1).flatten(-2) * sin              # interleaved
        cat([first * cos - second * sin, second * cos + first * sin])    # in chunks
        view_as_real(view_as_complex(x) * polar(1, angles)).flatten(-2)  # complex
    ->
        inlay.rope(x, cos, sin, interleaved)

    The op takes one angle per pair. Tables of two equal columns for each are cut in half, when
    the graph that computes them shows that the two are equal; a table for the other direction of
    rotation has its sine negated. A partial rotation is the same pattern on a slice of the head.
    """
    count = rewrite_complex(gm)
    for node in [*calls(gm, *SUMS), *calls(gm, *JOINS)]:
        if not _is_candidate(node):
            continue
        found = _match(node)
        if isinstance(found, str):
            refuse(gm, node, found)
            continue
        replace(node, insert_call(gm.graph, node, ROPE, *found))
        count += 1
    return count


def _is_candidate(node: Node) -> bool:
    """Whether this may be a rotation: the rules that follow say no to all that is none."""
    if is_call(node, *SUMS):
        products = node.args[:2]
        if not all(is_call(product, aten.mul.Tensor) for product in products):
            return False
        factors = [factor for product in products for factor in product.args[:2]]
        return any(is_call(part, aten.neg.default) for f in factors for part in _parts(f))
    parts = _parts(node)
    return len(parts) == 2 and all(
        is_call(part, *SUMS) and all(is_call(arg, aten.mul.Tensor) for arg in part.args[:2])
        for part in parts
    )


def _parts(value: Any) -> Sequence[Any]:
    """What a tensor is put together of: cat(parts), or stack(parts) as one dimension."""
    if is_call(value, aten.reshape.default) and is_call(value.args[0], aten.stack.default):
        return value.args[0].args[0]
    return value.args[0] if is_call(value, aten.cat.default) else ()


def _match(node: Node) -> tuple[Node, Node, Node, bool] | str:
    """The op's arguments, or why there are none."""
    size = fake(node).shape[-1]
    if not isinstance(size, int) or size % 2:
        return f"{size} columns cannot be rotated in pairs"
    columns = Columns()
    out = columns.of(node)
    reasons = []
    for interleaved in (False, True):
        for x in _sources(columns, out, interleaved):
            solved = _solve(out, x, interleaved)
            found = solved if isinstance(solved, str) else _insert(columns, node, solved)
            if not isinstance(found, str):
                return found
            reasons.append(found)
    # What comes nearest to a rotation tells most.
    return next((reason for reason in reasons if reason != NO_PAIRS), NO_PAIRS)


def _pairs(size: int, interleaved: bool) -> list[tuple[int, int]]:
    if interleaved:
        return [(i, i + 1) for i in range(0, size, 2)]
    return [(i, i + size // 2) for i in range(size // 2)]


def _sources(columns: Columns, out: tuple[Column, ...], interleaved: bool) -> list[tuple[Key, ...]]:
    """What may have been rotated: tensors as wide as the result, or their two halves."""
    size = len(out)
    factors = {key for column in out for _, keys in column for key in keys}
    known = [keys for keys in columns.nodes if factors.issuperset(keys)]
    whole = [keys for keys in known if len(keys) == size and len(set(keys)) == size]
    halves = [] if interleaved else [keys for keys in known if len(keys) == size // 2]
    return whole + [a + b for a in halves for b in halves if not set(a) & set(b)]


def _solve(out: tuple[Column, ...], x: tuple[Key, ...], interleaved: bool) -> _Rotation | str:
    """Cosines and sines for which the columns are a rotation of x, or why there are none."""
    cosines, sines, signs = [], [], set()
    for i, j in _pairs(len(out), interleaved):
        entries = [_cofactor(out[a], x[b]) for a, b in ((i, i), (i, j), (j, j), (j, i))]
        known = [entry for entry in entries if entry is not None]
        if any(len(out[a]) != 2 for a in (i, j)) or len(known) != len(entries):
            return NO_PAIRS
        (sign, cos), (first, sin), (other_sign, other_cos), (second, other_sin) = known
        if (sign, other_sign) != (1, 1) or first == second:
            return "the signs are not those of a rotation"
        if cos != other_cos or sin != other_sin:
            return "the two columns of cos or sin for one pair are not known to be equal"
        cosines.append(cos)
        sines.append(sin)
        signs.add(first)
    if len(signs) != 1:
        return "the pairs are rotated in different directions"
    return _Rotation(x, tuple(cosines), tuple(sines), interleaved, signs == {1})


def _cofactor(column: Column, key: Key) -> tuple[int, Key] | None:
    """Sign and other factor of the one product in a sum that has this factor."""
    found = [(s, keys) for s, keys in column if len(keys) == 2 and key in keys]
    if len(found) != 1:
        return None
    sign, (left, right) = found[0]
    return sign, right if left == key else left


def _insert(columns: Columns, node: Node, found: _Rotation) -> tuple[Node, Node, Node, bool] | str:
    """Find or make the tensors of these columns."""
    tables = [_table(columns, keys, found.interleaved) for keys in (found.cos, found.sin)]
    cos, sin = tables
    if cos is None or sin is None:
        return "cos or sin is not a tensor of its own"
    x = columns.nodes.get(found.x)
    halves = [columns.nodes.get(keys) for keys in _halves(found.x)]
    rows, width = x or halves[0], len(found.cos)
    if not same_shape(fake(node)[..., :width], fake(rows)[..., :width]):
        return "cos or sin broadcasts the tensor that is rotated to a larger shape"
    if x is None:
        x = insert_call(node.graph, node, aten.cat.default, halves, -1)
    cos, sin = (_cut(table, width, found.interleaved) for table in (cos, sin))
    if found.negated:
        sin = _after(sin, aten.neg.default, sin)
    if fake(cos).dtype != fake(sin).dtype:
        return f"cos is {fake(cos).dtype} and sin {fake(sin).dtype}"
    return x, cos, sin, found.interleaved


def _halves(keys: tuple[Key, ...]) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    return keys[: len(keys) // 2], keys[len(keys) // 2 :]


def _table(columns: Columns, keys: tuple[Key, ...], interleaved: bool) -> Node | None:
    """The tensor with these columns, or with each of them twice."""
    twice = tuple(key for key in keys for _ in range(2)) if interleaved else keys + keys
    return columns.nodes.get(keys) or columns.nodes.get(twice)


def _cut(table: Node, size: int, interleaved: bool) -> Node:
    """One column for each pair."""
    width = int(fake(table).shape[-1])
    if width == size:
        return table
    bounds = (0, width, 2) if interleaved else (0, size)
    return _after(table, aten.slice.Tensor, table, fake(table).dim() - 1, *bounds)


def _after(node: Node, target: Any, *args: Any) -> Node:
    """A call right behind a node, made once: a table is the same for all layers."""
    for user in node.users:
        if is_call(user, target) and user.args == args:
            return user
    made = insert_call(node.graph, node.next, target, *args)
    for key in ("stack_trace", "nn_module_stack"):
        if key in node.meta:
            made.meta[key] = node.meta[key]
    return made
