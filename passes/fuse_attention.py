"""Attention that a model computes by itself, found in its plain graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from inlay.passes.attention_mask import NotExpressible, ScoreForm, recover
from inlay.passes.evaluate_scores import LEARNED, Evaluator, positions_of
from inlay.passes.graph import (
    add_weight,
    bind,
    calls,
    fake,
    insert_call,
    is_call,
    refuse,
    replace,
    same_shape,
    strip_cast,
)

aten = torch.ops.aten
ATTENTION = torch.ops.inlay.attention.default
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
FEW_TOKENS = 4
MAX_TOKENS = 2048
MAX_BYTES = 256 << 20
"""Of one score tensor that is evaluated: few heads are tried with MAX_TOKENS, many with fewer."""


def fuse_attention(gm: GraphModule) -> int:
    """Softmax attention and SDPA, with whatever scales and masks the scores.

        scores = matmul(q, k^T) * scale + mask             # [1, Hq, T, T]
        out = matmul(softmax(scores), v)                   # [1, Hq, T, Dv]
    ->
        out = inlay.attention(q, k, v, position_ids, layer, scale, window, softcap, ...)

    Repeated key and value heads (repeat_kv) are undone. `gm.meta["constants"]` gives the weights
    by name, for masks that lie in buffers, `gm.meta["max_num_tokens"]` the tokens that the graph
    holds for, `gm.meta["max_seq_len"]` those that a request may have; see attention_mask.py for
    how masks are recovered.
    """
    positions = positions_of(gm)
    forms: dict[Any, ScoreForm] = {}
    count = 0
    for node in calls(gm, *SOFTMAX, SDPA):
        if not _is_over_tokens(node):
            continue
        try:
            found = _from_sdpa(gm, node) if is_call(node, SDPA) else _from_softmax(gm, node, forms)
            _emit(gm, found, positions, count)
        except NotExpressible as reason:
            refuse(gm, node, str(reason))
            continue
        count += 1
    return count


def plain_attentions(gm: GraphModule) -> list[Node]:
    """Every softmax over tokens, and every SDPA."""
    return [node for node in calls(gm, *SOFTMAX, SDPA) if _is_over_tokens(node)]


def _is_over_tokens(node: Node) -> bool:
    return is_call(node, SDPA) or not isinstance(fake(node).shape[bind(node)["dim"]], int)


Found = tuple[Node, Node, Node, Node, "ScoreForm"]
"""Query, key, value, the node whose value attention gives, and the scores' form."""


def _from_softmax(gm: GraphModule, softmax: Node, forms: dict[Any, ScoreForm]) -> Found:
    shape, dim = list(fake(softmax).shape), bind(softmax)["dim"]
    if dim % len(shape) != len(shape) - 1 or {*map(str, shape[-2:])} != {_num_tokens(gm)}:
        raise NotExpressible(f"the softmax is over dimension {dim} of {shape}")
    product = _product_of(softmax)
    chain = _chain(product, softmax)
    key = (_spell(product, chain), len(fake(product).shape))
    if key not in forms:
        forms[key] = _recover(gm, product, chain, softmax)
    output = _weighted_sum(softmax)
    left, right = product.args[1:3] if is_call(product, aten.baddbmm.default) else product.args[:2]
    return left, _transposed(gm, right, softmax), output.args[1], output, forms[key]


def _from_sdpa(gm: GraphModule, node: Node) -> Found:
    arguments = bind(node)
    query, size = arguments["query"], fake(arguments["query"]).shape[-1]
    scale = arguments["scale"] or float(size) ** -0.5
    if arguments["dropout_p"]:
        raise NotExpressible("attention drops out weights")
    mask = arguments["attn_mask"]
    if mask is None:
        form = ScoreForm(scale, 0, 0.0, bool(arguments["is_causal"]), 0, None)
        return query, arguments["key"], arguments["value"], node, form
    evaluate, tried = Evaluator(gm), _tried_tokens(gm, fake(query).shape[-3])

    def bias(num_tokens: int) -> Tensor:
        value = evaluate(mask, num_tokens)
        hidden = torch.full((), -torch.inf, dtype=torch.float64)
        value = torch.where(value, 0.0, hidden) if value.dtype == torch.bool else value.double()
        return _by_head(value.expand(*value.shape[:-2], num_tokens, num_tokens))

    evaluate.check_reach(mask, tried)
    few = bias(FEW_TOKENS)
    form = recover(lambda x: x * scale + few, bias(tried))
    return query, arguments["key"], arguments["value"], node, form


def _product_of(softmax: Node) -> Node:
    """The one product of queries and keys that the scores come from."""
    found: dict[Node, None] = {}
    seen, queue = set(), [softmax.args[0]]
    while queue:
        node = queue.pop()
        if node in seen or not isinstance(node, Node):
            continue
        seen.add(node)
        if is_call(node, *PRODUCTS):
            found[node] = None
            continue
        if not is_call(node, *LEARNED):
            queue.extend(node.all_input_nodes)
    if len(found) != 1:
        raise NotExpressible(f"the softmax is of {len(found)} products, not of one of q and k")
    return next(iter(found))


def _chain(product: Node, softmax: Node) -> list[Node]:
    """What depends on the product on the way to the softmax, in graph order."""
    inside = {product}
    nodes = []
    for node in product.graph.nodes:
        if node is softmax:
            break
        if node not in inside and any(arg in inside for arg in node.all_input_nodes):
            inside.add(node)
            nodes.append(node)
    return nodes


def _spell(product: Node, chain: list[Node]) -> str:
    """Equal for chains that compute the same: layers share what was recovered."""
    names = {node: f"n{index}" for index, node in enumerate([product, *chain])}

    def spell(value: Any) -> Any:
        return names.get(value, value.name) if isinstance(value, Node) else value

    parts = [product.args[0] if is_call(product, aten.baddbmm.default) else None, product.kwargs]
    for node in chain:
        parts.append((node.target, torch.fx.map_arg(node.args, spell), node.kwargs))
    return repr(parts)


def _recover(gm: GraphModule, product: Node, chain: list[Node], softmax: Node) -> ScoreForm:
    evaluate = Evaluator(gm)
    scores = softmax.args[0]

    def function(num_tokens: int) -> Callable[[Tensor], Tensor]:
        def at(value: Tensor) -> Tensor:
            return _by_head(evaluate(scores, num_tokens, product, value))

        return at

    heads = int(fake(scores).numel() // fake(scores).shape[-1] // fake(scores).shape[-2])
    tried = _tried_tokens(gm, heads)
    evaluate.check_reach(scores, tried, product)
    return recover(function(FEW_TOKENS), function(tried)(torch.zeros((), dtype=torch.float64)))


def _num_tokens(gm: GraphModule) -> str:
    """The symbol of the row's size."""
    return str(fake(positions_of(gm)).shape[1])


def _tried_tokens(gm: GraphModule, heads: Any) -> int:
    fitting = int((MAX_BYTES / (8 * int(heads))) ** 0.5)
    return min(MAX_TOKENS, fitting, gm.meta["max_num_tokens"])


def _by_head(value: Tensor) -> Tensor:
    return value.double().reshape(-1, *value.shape[-2:])


def _weighted_sum(softmax: Node) -> Node:
    """The product of the weights, cast or reshaped at most, with the values."""
    node: Node = softmax
    while True:
        users = [u for u in node.users if u.op == "call_function"]
        if len(users) != 1:
            raise NotExpressible(f"the weights have {len(users)} uses, not one")
        user = users[0]
        if is_call(user, *PRODUCTS[:2]) and user.args[0] is node:
            return user
        if not is_call(user, aten.to.dtype, aten.reshape.default, aten.view.default):
            raise NotExpressible(f"the weights go through {user.target} before the values")
        node = user


def _transposed(gm: GraphModule, node: Any, before: Node) -> Node:
    """A key given as [.., D, T] as [.., T, D]."""
    if is_call(node, aten.transpose.int):
        source, *dims = node.args
        rank = fake(source).dim()
        if {d % rank for d in dims} == {rank - 1, rank - 2}:
            return source
    return insert_call(gm.graph, before, aten.transpose.int, node, -1, -2)


def _unrepeated(node: Node) -> Node:
    """Keys or values before their heads were repeated for the query heads of a group."""
    source = strip_cast(node)
    if is_call(source, aten.reshape.default) and is_call(source.args[0], aten.expand.default):
        inner = source.args[0].args[0]
        rank = fake(inner).dim()
        if is_call(inner, aten.unsqueeze.default) and inner.args[1] % rank == rank - 3:
            source = inner.args[0]
    elif is_call(source, aten.repeat_interleave.self_int):
        arguments, rank = bind(source), fake(source).dim()
        if arguments["dim"] is not None and arguments["dim"] % rank == rank - 3:
            source = source.args[0]
    return strip_cast(source)


def _as_row(gm: GraphModule, node: Node, before: Node, dtype: torch.dtype) -> Node:
    """[1, H, T, D] or [H, T, D] as [T, H, D]."""
    shape = list(fake(node).shape)
    if len(shape) not in (3, 4) or str(shape[-2]) != _num_tokens(gm) or shape[:-3] not in ([], [1]):
        raise NotExpressible(
            f"queries, keys or values are {shape}, not a head's row of tokens each"
        )
    if len(shape) == 4:
        node = insert_call(gm.graph, before, aten.select.int, node, 0, 0)
    row = insert_call(gm.graph, before, aten.transpose.int, node, 0, 1)
    if fake(row).dtype != dtype:
        row = insert_call(gm.graph, before, aten.to.dtype, row, dtype)
    return row


def _emit(gm: GraphModule, found: Found, positions: Node, layer: int) -> None:
    graph, (query, key, value, output, form) = gm.graph, found
    # The cache holds what a model computed, not what it was widened to for the product.
    parts = (strip_cast(query), _unrepeated(key), _unrepeated(value))
    rows = [_as_row(gm, part, output, fake(parts[2]).dtype) for part in parts]
    heads = [int(fake(row).shape[1]) for row in rows]
    if heads[1] != heads[2] or heads[0] % heads[1]:
        raise NotExpressible(f"there are {heads[1]} heads of keys and {heads[2]} of values")
    slopes = None
    if form.slopes is not None:
        dtype = form.slopes_dtype
        recipe = {"op": "constant", "inputs": [], "values": form.slopes}
        recipe["dtype"] = str(dtype).removeprefix("torch.")
        like = fake(value).new_empty(len(form.slopes), dtype=dtype)
        slopes = add_weight(gm, f"alibi_slopes.{layer}", recipe, like)
    flat = insert_call(graph, output, aten.select.int, positions, 0, 0)
    options = (form.scale, form.window, form.softcap, None, form.causal, form.chunk, slopes)
    call = insert_call(graph, output, ATTENTION, *rows, flat, layer, *options)
    result = insert_call(graph, output, aten.transpose.int, call, 0, 1)
    if fake(output).dim() == 4:
        result = insert_call(graph, output, aten.unsqueeze.default, result, 0)
    if fake(result).dtype != fake(output).dtype:
        result = insert_call(graph, output, aten.to.dtype, result, fake(output).dtype)
    if not same_shape(fake(result), fake(output)):
        raise NotExpressible(f"attention gives {list(fake(output).shape)}")
    replace(output, result)
