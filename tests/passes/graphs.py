"""Graphs and numbers for the tests of the passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule

from inlay.lowering.capture import capture
from inlay.lowering.export import Captured
from inlay.passes.canonicalise import canonicalise
from inlay.passes.check import Check, relative_rms
from inlay.passes.graph import copy_graph, erase_unused_weights
from tests.toys import build_toy

LENGTHS = (9, 12, 3)
"""Tokens of the packed requests: none a multiple of the block size, two beyond a window of 8."""
BLOCK_SIZE = 4
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Relative RMS error where sums may be taken in another order: a few roundings of 2^-24, 2^-9."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def export(
    module: torch.nn.Module, *inputs: torch.Tensor, canonical: bool = True, dynamic: bool = True
) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """A module's graph in the form of passes/graph.py, and its tensors.

    Dimension 1 is dynamic unless told otherwise, and the same in all inputs that have it. Inputs
    are called x0, x1, ...
    """
    module = module.eval()
    tokens = torch.export.Dim("tokens", min=4, max=64)
    shapes = tuple({1: tokens} if dynamic and x.dim() > 1 else None for x in inputs)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    gm = GraphModule(torch.nn.Module(), program.graph_module.graph)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    user_inputs = iter(enumerate(inputs))
    for node in gm.graph.find_nodes(op="placeholder"):
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            index, value = next(user_inputs)
            node.meta["input"] = f"x{index}"
            tensors[f"x{index}"] = value
        else:
            node.meta["weight"] = spec.target
    gm.meta.update(recipes={}, modules={})
    if canonical:
        canonicalise(gm)
        gm.graph.eliminate_dead_code()
    return gm, tensors


def rewrite(
    gm: GraphModule, tensors: dict[str, torch.Tensor], run: Callable[[GraphModule], int]
) -> tuple[int, float]:
    """Run a pass as the driver does: its count, and the relative RMS error of the output."""
    check = Check(tensors.__getitem__, 0.0)
    before = check.run(copy_graph(gm))
    count = run(gm)
    gm.graph.eliminate_dead_code()
    erase_unused_weights(gm)
    gm.graph.lint()
    return count, relative_rms(before, check.run(gm))


def targets(gm: GraphModule) -> list[str]:
    """The ops of a graph in order: `aten.mul.Tensor`, `inlay.linear.default`, ..."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def refusals(gm: GraphModule) -> str:
    """Why the last pass left what it left."""
    return "; ".join(reason for _, reason in gm.meta.pop("refusals", []))


def capture_toy(
    name: str, dtype: torch.dtype, **options: Any
) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """A toy model's captured graph, and tensors for all placeholders that passes add too."""
    captured, config = _capture(name, dtype, tuple(options.items()))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = [40, kv_heads, BLOCK_SIZE, head_dim]
    tensors = {**captured.sources, **step_tensors(config.vocab_size)}
    for layer in range(config.num_hidden_layers):
        for kind in ("k_cache", "v_cache"):
            tensors[f"{kind}.{layer}"] = torch.full(cache, torch.nan, dtype=dtype)
    return copy_graph(captured.graph), tensors


@functools.cache
def _capture(name: str, dtype: torch.dtype, options: tuple[Any, ...]) -> tuple[Captured, Any]:
    model = build_toy(name, dtype, **dict(options))
    return capture(model, max_num_tokens=64), model.config


def step_tensors(vocab_size: int) -> dict[str, torch.Tensor]:
    """Three whole requests in one row, with different scattered blocks for each of two groups."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ids = torch.randint(vocab_size, (1, sum(LENGTHS)), generator=generator)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    tensors = {
        "input_ids": ids,
        "position_ids": positions[None],
        "seq_lens": torch.tensor(LENGTHS, dtype=torch.int32),
        "query_start_loc": ends.to(torch.int32),
        "logits_indices": ends[1:] - 1,
    }
    request = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    for group in range(2):
        blocks = torch.randperm(40, generator=generator)[: 3 * len(LENGTHS)].view(len(LENGTHS), 3)
        slots = blocks[request, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        tensors[f"block_table.{group}"] = blocks.to(torch.int32)
        tensors[f"slot_mapping.{group}"] = slots
    return tensors
