"""Bytes and operations that a program cannot avoid, whatever its weights are stored as.

Counted are products, attention, weights and KV cache. Shapes and dtypes are those of the segments'
graph.json: a weight is as many bytes as it is stored in, int8, packed 4 bit and fp8 included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from inlay.backends.program import AttentionStep
from inlay.passes.kv_formats import kv_dtype, vector_nbytes

Json = dict[str, Any]
Positions = int | Sequence[int] | range | np.ndarray

WEIGHT_ARGUMENTS: dict[str, tuple[int, ...]] = {
    "inlay.linear": (1,),
    "inlay.weight_only_linear": (1,),
    "inlay.int8_linear": (3,),
    "inlay.fp8_linear": (2,),
    "inlay.experts": (3, 4),
    "inlay.quantized_experts": (3, 6),
    "aten.linear": (1,),
    "aten.mm": (1,),
    "aten.matmul": (1,),
    "aten.bmm": (1,),
    "aten.addmm": (2,),
}
"""Products, and which of their arguments are weights."""

EXPERTS = ("inlay.experts", "inlay.quantized_experts")
LOOKUPS = ("aten.embedding", "inlay.quantized_embedding")
VIEWS = ("aten.t", "aten.transpose", "aten.permute", "aten.reshape", "aten.view", "aten.unsqueeze")


@dataclass(frozen=True)
class Product:
    """x [rows, in_features] times a weight [out_features, in_features], with `calls` of it for
    each row: a token, or with per_logit a row of logits. dtype: what it is computed in."""

    out_features: int
    in_features: int
    dtype: str
    calls: float = 1.0
    per_logit: bool = False

    @property
    def flops(self) -> float:
        """Of one row."""
        return 2 * self.out_features * self.in_features * self.calls


@dataclass(frozen=True)
class Weight:
    """num_experts, experts_per_token: 0 where every token meets all of the weight."""

    num_bytes: int
    num_experts: int = 0
    experts_per_token: int = 0

    def bytes_read(self, num_tokens: int) -> float:
        """In one step; of experts those met on average, if tokens choose evenly."""
        if not self.num_experts:
            return self.num_bytes
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self.num_bytes * (1 - missed)


class ProgramCost:
    """What steps of an engine cost."""

    def __init__(self, engine: Any, kv_cache_dtype: str = "auto") -> None:
        artifact, program = engine.artifact, engine.artifact.program
        index = artifact.json("weights/index.json")
        self.attentions: tuple[AttentionStep, ...] = program.attention_steps
        self._cache = kv_dtype(kv_cache_dtype, getattr(torch, program.dtype))
        self._weights: dict[str, Weight] = {}
        self.products: list[Product] = []
        for step in program.segment_steps:
            nodes = artifact.json(f"segments/{step.segment}/graph.json")["nodes"]
            is_head = program.logits in step.outputs and not program.is_encoder
            self.products += _products(nodes, program.dtype, is_head)
            for name, weight in zip(step.weights, _weights(nodes), strict=True):
                if weight is not None:
                    self._weights[index[name]["tensor"]] = weight

    def weight_bytes(self, num_tokens: int = 1) -> float:
        """Read by one step: each weight once, tied ones once; rows that are only looked up, and
        experts that no token meets, not at all."""
        return sum(weight.bytes_read(num_tokens) for weight in self._weights.values())

    def kv_bytes(self, contexts: Positions) -> float:
        """Keys and values read for new tokens that each see so many positions, their own too."""
        return sum(
            float(_visible(step, contexts).sum())
            * step.num_kv_heads
            * sum(vector_nbytes(self._cache, size) for size in (step.head_dim, step.v_head_dim))
            for step in self.attentions
        )

    def product_flops(self, num_tokens: int, num_logits: int) -> float:
        """2 operations for each element of a weight that a row meets."""
        return sum(
            product.flops * (num_logits if product.per_logit else num_tokens)
            for product in self.products
        )

    def attention_flops(self, contexts: Positions) -> float:
        """Scores and weighted values of new tokens that each see so many positions."""
        return sum(
            float(_visible(step, contexts).sum())
            * 2 * step.num_heads * (step.head_dim + step.v_head_dim)
            for step in self.attentions
        )  # fmt: skip


def _visible(step: AttentionStep, contexts: Positions) -> np.ndarray:
    seen = np.atleast_1d(np.asarray(contexts, dtype=np.float64))
    if step.window:
        seen = np.minimum(seen, step.window)
    if step.chunk:
        seen = (seen - 1) % step.chunk + 1
    return seen


def _name(node: Json) -> str:
    """An op without its overload."""
    parts = str(node["op"]).split(".")
    return ".".join(parts[:2])


def _weight_of(nodes: list[Json], argument: Any) -> Json | None:
    """The weight that an argument is, or is a view of."""
    while isinstance(argument, dict) and "node" in argument:
        node = nodes[argument["node"]]
        if node["op"] == "weight":
            return node
        if _name(node) not in VIEWS:
            return None
        argument = node["args"][0]
    return None


def _products(nodes: list[Json], dtype: str, is_head: bool) -> Iterator[Product]:
    for node in nodes:
        name = _name(node)
        for place in WEIGHT_ARGUMENTS.get(name, ()):
            arguments = [*node["args"], *node["kwargs"].values()]
            weight = _weight_of(nodes, arguments[place]) if place < len(arguments) else None
            if weight is None:
                continue
            is_int8 = name == "inlay.int8_linear" or "int8" in arguments[place + 1 :]
            experts = _experts_per_token(nodes, node) if name in EXPERTS else 1
            *_, out_features, in_features = weight["shape"]
            if weight["dtype"] == "uint8":  # two numbers of 4 bits in a byte
                in_features *= 2
            kind = "int8" if is_int8 else dtype
            yield Product(out_features, in_features, kind, experts, is_head)


def _weights(nodes: list[Json]) -> list[Weight | None]:
    """For each weight of a segment; None where it is only looked up in."""
    found: list[Weight | None] = []
    for number, weight in enumerate(node for node in nodes if node["op"] == "weight"):
        users = [node for node in nodes if {"node": number} in node.get("args", [])]
        size = prod(weight["shape"]) * getattr(torch, weight["dtype"]).itemsize
        if users and all(_name(user) in LOOKUPS for user in users):
            found.append(None)
        elif users and all(_name(user) in EXPERTS for user in users):
            found.append(Weight(size, weight["shape"][0], _experts_per_token(nodes, users[0])))
        else:
            found.append(Weight(size))
    return found


def _experts_per_token(nodes: list[Json], experts: Json) -> int:
    """k of the nearest top-k above the chosen experts; all of them where there is none."""
    queue = [experts["args"][1]]
    while queue:
        argument = queue.pop(0)
        if isinstance(argument, list):
            queue += argument
        elif isinstance(argument, dict) and "node" in argument:
            node = nodes[argument["node"]]
            if _name(node) == "aten.topk":
                return int(node["args"][1])
            queue += node.get("args", [])
    place = WEIGHT_ARGUMENTS[_name(experts)][0]
    return int(nodes[experts["args"][place]["node"]]["shape"][0])
