"""Running graphs node by node, with every value at hand, and Hugging Face module by module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate
from transformers import PreTrainedModel

from inlay.backends.step import StepInputs, StepRequest, build_step
from inlay.lowering.export import Captured
from inlay.lowering.guards import run_alone
from inlay.passes.graph import placeholder_key
from inlay.passes.weights import make_weight

Values = dict[str, torch.Tensor]
"""Tensors by the names of the nodes that yield them; in a program its values' names are these."""


@dataclass(frozen=True)
class _Weight:
    """Stands for a weight until an op reads it, so that not all are in memory at once."""

    name: str


class GraphRunner:
    """Interprets a graph, captured or rewritten, over one step after another: caches last."""

    def __init__(self, captured: Captured, num_blocks: int, block_size: int) -> None:
        self._captured = captured
        self._caches: Values = {}
        for node in captured.graph.graph.find_nodes(op="placeholder"):
            name = node.meta.get("input", "")
            if name.startswith(("k_cache.", "v_cache.")):
                _, num_heads, _, size = node.meta["val"].shape
                shape = (num_blocks, num_heads, block_size, size)
                self._caches[name] = torch.zeros(shape, dtype=node.meta["val"].dtype)

    @torch.inference_mode()
    def __call__(self, step: StepInputs) -> Values:
        """Every node's value for this step."""
        recipes, sources = self._captured.graph.meta["recipes"], self._captured.sources
        values: Values = {}

        class Recorder(Interpreter):
            def run_node(self, n: Node) -> Any:
                if n.op == "placeholder":
                    return super().run_node(n)
                result = super().run_node(n)
                if isinstance(result, torch.Tensor):
                    values[n.name] = result
                return result

            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                args, kwargs = map_aggregate((args, kwargs), load)
                return super().call_function(target, args, kwargs)

        def load(value: Any) -> Any:
            if isinstance(value, _Weight):
                return make_weight(value.name, recipes, sources.__getitem__)
            return value

        placeholders = self._captured.graph.graph.find_nodes(op="placeholder")
        Recorder(self._captured.graph).run(*[self._input(node, step) for node in placeholders])
        return values

    def _input(self, node: Node, step: StepInputs) -> Any:
        """The contract's names for a step's tensors, see passes/insert_paged_kv.py."""
        name = placeholder_key(node)
        if "weight" in node.meta:
            return _Weight(name)
        if name in self._caches:
            return self._caches[name]
        kind, _, group = name.partition(".")
        if kind in ("input_ids", "position_ids"):
            return getattr(step, kind)[None]
        if kind in ("slot_mapping", "block_table"):
            return getattr(step, "block_tables" if kind == "block_table" else kind)[int(group)]
        return getattr(step, name)


def packed_step(requests: Sequence[Sequence[int]], num_groups: int, block_size: int) -> StepInputs:
    """All requests prefilled in one step, each in consecutive blocks of its own."""
    num_blocks = blocks_per_request(requests, block_size)
    tables = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(len(requests))]
    return build_step(
        [
            StepRequest(ids, 0, [table] * num_groups)
            for ids, table in zip(requests, tables, strict=True)
        ],
        block_size,
    )


def blocks_per_request(requests: Sequence[Sequence[int]], block_size: int) -> int:
    return max(-(-len(ids) // block_size) for ids in requests)


@torch.inference_mode()
def module_outputs(
    model: PreTrainedModel,
    names: Iterable[str],
    requests: Sequence[Sequence[int]],
    inputs: Iterable[str] = (),
) -> dict[str, torch.Tensor]:
    """What Hugging Face's modules yield, in the order in which they end, for requests run apart;
    of the modules in inputs what they are given.

    Rows of all requests are joined on the last dimension but one, as they lie in a packed step.
    Modules that are called several times, or whose outputs do not join, are left out.
    """
    calls: dict[str, list[torch.Tensor]] = {}

    def hook(name: str, of_input: bool) -> Any:
        def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
            output = args if of_input else output
            first = output[0] if isinstance(output, list | tuple) else output
            if isinstance(first, torch.Tensor):
                calls.setdefault(name, []).append(first.float())

        return keep

    wanted = [*((name, False) for name in names), *((name, True) for name in inputs)]
    handles = [
        model.get_submodule(name).register_forward_hook(hook(name, of_input))
        for name, of_input in wanted
    ]
    try:
        for ids in requests:
            run_alone(model, torch.tensor([list(ids)]))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.cat(values, dim=-2)
        for name, values in calls.items()
        if len(values) == len(requests) and _join(values)
    }


def _join(values: Sequence[torch.Tensor]) -> bool:
    rest = {(value.shape[:-2], value.shape[-1]) for value in values if value.dim() >= 2}
    return len(rest) == 1 and all(value.dim() >= 2 for value in values)


def module_paths(node: Node) -> list[str]:
    """The captured modules that a node lies in, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def last_nodes(gm: GraphModule) -> Mapping[str, list[Node]]:
    """For each captured module its nodes that yield a tensor, the last one first."""
    found: dict[str, list[Node]] = {}
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            for path in module_paths(node):
                found.setdefault(path, []).append(node)
    return found


def source_of(node: Node) -> str:
    """Where the model's own code made a node: `File "...", line N, in f: code`, "" if unknown."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    lines = [line for line in lines if line]
    places = [i for i, line in enumerate(lines) if line.startswith("File ")]
    inside = os.path.dirname(torch.__file__)
    own = [i for i in places if inside not in lines[i]] or places
    return ": ".join(lines[own[-1] : own[-1] + 2]) if own else ""
