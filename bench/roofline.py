"""What the machine's memory allows: the limit that batch-1 decode is measured against."""

from __future__ import annotations

import time
from typing import Any

import torch

READ_BYTES = 256 << 20
"""Larger than the caches a core can call its own, small enough to be quick."""


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second that all threads together read in one stream; the best of some tries.

    The best, since the question is what the memory can do, not what its other users left.
    """
    data = torch.ones(READ_BYTES // 4, dtype=torch.int32)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.max(data)
        best = min(best, time.perf_counter() - begin)
    return READ_BYTES / best


def product_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a large matrix product in this dtype; the best of some tries."""
    x, weight = torch.ones(512, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - begin)
    return 2 * 512 * 2048 * 2048 / best


def decode_bytes(engine: Any, num_cached_tokens: int = 0) -> int:
    """Bytes that one decode step of one request must read: weights once, its KV cache once.

    An embedding table that is only looked up in does not count; a tied one is the LM head too.
    """
    program, artifact = engine.artifact.program, engine.artifact
    dtype: torch.dtype = getattr(torch, program.dtype)
    index = artifact.json("weights/index.json")
    read: dict[str, int] = {}
    for step in program.segment_steps:
        nodes = artifact.json(f"segments/{step.segment}/graph.json")["nodes"]
        weights = [node for node in nodes if node["op"] == "weight"]
        for number, (name, node) in enumerate(zip(step.weights, weights, strict=True)):
            if _is_looked_up(nodes, number):
                continue
            size = getattr(torch, node["dtype"]).itemsize
            for extent in node["shape"]:
                size *= extent
            read[index[name]["tensor"]] = size
    per_token = sum(s.num_kv_heads * (s.head_dim + s.v_head_dim) for s in program.attention_steps)
    return sum(read.values()) + num_cached_tokens * per_token * dtype.itemsize


def _is_looked_up(nodes: list[dict[str, Any]], number: int) -> bool:
    """Whether a weight is only the table of an embedding."""
    reference = {"node": number}
    users = [node for node in nodes if reference in node.get("args", [])]
    return bool(users) and all(node["op"] == "aten.embedding.default" for node in users)
