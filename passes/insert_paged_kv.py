"""Attention over a paged KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.passes.graph import add_input, bind, calls, fake, insert_call, replace

Visible = tuple[int, int, bool]
"""Window, chunk and causality: what a query sees."""


def insert_paged_kv(gm: GraphModule) -> int:
    """Give each attention its cache, and the step's metadata as inputs.

        inlay.attention(q, k, v, position_ids, layer, ...)
    ->
        inlay.paged_attention(q, k, v, k_cache.<cache>, v_cache.<cache>, slot_mapping.<group>,
                              block_table.<group>, seq_lens, query_start_loc, layer, ...)

    Layers that see equally far form a KV group, since those of a small window keep fewer blocks:
    `gm.meta["kv_groups"]` = [{"window": 0, "chunk": 0, "layers": [0, 1]}, ...]. A layer that takes
    another's keys and values takes its cache too. An encoder's tokens see those after them, so its
    requests come whole and its cache is memory for one layer at a time: all layers share one.
    """
    groups: dict[Visible, list[int]] = {}
    caches: dict[Any, int] = {}
    attentions = calls(gm, torch.ops.inlay.attention.default)
    for node in attentions:
        arguments = bind(node)
        sees = (arguments["window"], arguments["chunk"], arguments["causal"])
        cache = caches.setdefault(_cache_key(arguments), arguments["layer"])
        groups.setdefault(sees, []).append(arguments["layer"])
        _page(gm, node, cache, list(groups).index(sees))
    gm.meta["kv_groups"] = [
        {"window": window, "chunk": chunk, "layers": layers}
        for (window, chunk, _), layers in groups.items()
    ]
    return len(attentions)


def _cache_key(arguments: dict[str, Any]) -> Any:
    key, value = arguments["k"], arguments["v"]
    sees = (arguments["window"], arguments["chunk"], arguments["causal"])
    if arguments["causal"]:
        return key, value, sees
    return fake(key).shape[1:], fake(value).shape[1:], sees


def _page(gm: GraphModule, node: Node, cache: int, group: int) -> None:
    arguments = bind(node)
    q, k, v, _, layer, *rest = arguments.values()
    key, value = fake(k), fake(v)
    blocks, block_size, width = f"num_blocks.{group}", "block_size", f"max_blocks.{group}"
    k_shape = [blocks, key.shape[1], block_size, key.shape[2]]
    v_shape = [blocks, value.shape[1], block_size, value.shape[2]]
    inputs = [
        add_input(gm, f"k_cache.{cache}", k_shape, key.dtype),
        add_input(gm, f"v_cache.{cache}", v_shape, value.dtype),
        add_input(gm, f"slot_mapping.{group}", [key.shape[0]], torch.int64),
        add_input(gm, f"block_table.{group}", ["num_requests", width], torch.int32),
        add_input(gm, "seq_lens", ["num_requests"], torch.int32),
        add_input(gm, "query_start_loc", ["num_requests_plus_1"], torch.int32),
    ]
    target = torch.ops.inlay.paged_attention.default
    paged = insert_call(gm.graph, node, target, q, k, v, *inputs, layer, *rest)
    replace(node, paged)
