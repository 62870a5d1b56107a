"""What a step costs by arithmetic: floating point operations and bytes, and the roofline above it.

Counted are matrix products and attention, weights and KV cache: what no implementation can avoid.
Pointwise work is left out and activations are taken to stay in the processor's caches, so that
the speeds that follow are upper limits. Roofline model: Williams, Waterman & Patterson, 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from inlay.backends.program import AttentionStep, Program
from inlay.passes.graph import is_call
from inlay.report.fake_run import EXPERTS, Graphs, SegmentRun, run_program, spec, weights_of

TABLES = (torch.ops.aten.embedding.default, torch.ops.inlay.quantized_embedding.default)
DECODE_CONTEXT = 1024
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Workload:
    """One step: each request brings new tokens; context tokens of it are cached after the step."""

    name: str
    num_requests: int
    num_new_tokens: int
    context: int

    @property
    def num_tokens(self) -> int:
        return self.num_requests * self.num_new_tokens


@dataclass(frozen=True)
class Machine:
    """bandwidth: bytes/s read from memory. flops: operations/s of large matrix products."""

    bandwidth: float
    flops: float

    @property
    def ridge(self) -> float:
        """Operations per byte from which on arithmetic is the limit, not memory."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class StepCost:
    """Operations and bytes of one step of a workload."""

    workload: Workload
    product_flops: int
    attention_flops: int
    weight_bytes: int
    kv_bytes: int

    @property
    def flops(self) -> int:
        return self.product_flops + self.attention_flops

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.num_bytes

    def is_memory_bound(self, machine: Machine) -> bool:
        return self.intensity < machine.ridge

    def tokens_per_second(self, machine: Machine) -> float:
        """Upper limit: the step's new tokens over the least time that the machine needs."""
        seconds = max(self.num_bytes / machine.bandwidth, self.flops / machine.flops)
        return self.workload.num_tokens / seconds


def workloads(max_seq_len: int, is_encoder: bool = False) -> tuple[Workload, ...]:
    """Decoding alone, decoding in a batch, and a prompt; shorter where the model is."""
    context, prompt = min(DECODE_CONTEXT, max_seq_len), min(PREFILL_TOKENS, max_seq_len)
    whole = Workload(f"{'text' if is_encoder else 'prefill'}, {prompt} tokens", 1, prompt, prompt)
    if is_encoder:
        return (whole,)
    return (
        Workload("decode, batch 1", 1, 1, context),
        Workload("decode, batch 32", 32, 1, context),
        whole,
    )


def step_cost(
    program: Program, graphs: Graphs, workload: Workload, memory_of: Callable[[str], str]
) -> StepCost:
    """memory_of: a weight's name -> the name of its memory, the same for tied weights."""
    flops = 0
    read: dict[str, int] = {}
    for step, run in run_program(program, graphs, workload.num_tokens, workload.num_requests):
        flops += run.flops
        for name, node in zip(step.weights, weights_of(graphs[step.segment]), strict=True):
            memory = memory_of(name)
            num_bytes = bytes_read(node, workload.num_tokens, _experts_per_token(run))
            read[memory] = max(num_bytes, read.get(memory, 0))
    attentions = program.attention_steps
    itemsize: int = getattr(torch, program.dtype).itemsize
    return StepCost(
        workload=workload,
        product_flops=flops,
        attention_flops=sum(_attention_flops(step, workload) for step in attentions),
        weight_bytes=sum(read.values()),
        kv_bytes=sum(_kv_values(step, workload) for step in attentions) * itemsize,
    )


def weight_bytes(node: Node) -> int:
    shape, dtype = spec(node)
    return prod(shape) * dtype.itemsize


def bytes_read(node: Node, num_tokens: int, experts_per_token: int) -> int:
    """Of a weight in one step: all of it; a row for each token where it is only a table; of
    experts those that are met, on average, if tokens choose evenly."""
    users = list(node.users)
    num_rows = spec(node)[0][0] if spec(node)[0] else 1
    share = 1.0
    if users and all(is_call(user, *TABLES) for user in users):
        share = min(num_rows, num_tokens) / num_rows
    elif users and all(is_call(user, *EXPERTS) for user in users):
        share = 1 - (1 - experts_per_token / num_rows) ** num_tokens
    return round(weight_bytes(node) * share)


def _experts_per_token(run: SegmentRun) -> int:
    """K of a segment's experts, 0 where it has none."""
    calls = [node for node in run.values if is_call(node, *EXPERTS)]
    return max((int(run.values[node.args[1]].shape[-1]) for node in calls), default=0)


def _attention_flops(step: AttentionStep, workload: Workload) -> int:
    """Scores and weighted values: 2 operations for each pair, head and element."""
    pairs = sum(len(keys) for keys in _visible(step, workload))
    per_pair = 2 * step.num_heads * (step.head_dim + step.v_head_dim)
    return workload.num_requests * pairs * per_pair


def _kv_values(step: AttentionStep, workload: Workload) -> int:
    """Elements of keys and values that pass through memory once: old ones read, new written."""
    visible = _visible(step, workload)
    tokens = max(keys.stop for keys in visible) - min(keys.start for keys in visible)
    per_token = step.num_kv_heads * (step.head_dim + step.v_head_dim)
    return workload.num_requests * tokens * per_token


def _visible(step: AttentionStep, workload: Workload) -> list[range]:
    """For each new token of a request, the positions it attends to."""
    context, ranges = workload.context, []
    for position in range(context - workload.num_new_tokens, context):
        begin, end = 0, position + 1 if step.causal else context
        if step.window:
            begin = max(begin, position - step.window + 1)
            end = min(end, position + step.window)
        if step.chunk:
            begin = max(begin, position // step.chunk * step.chunk)
            end = min(end, (position // step.chunk + 1) * step.chunk)
        ranges.append(range(begin, end))
    return ranges
