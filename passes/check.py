"""Compare a graph before and after a pass: by its outputs, then node by node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from inlay.passes.graph import last_source_line, placeholder_key
from inlay.passes.weights import WeightMaker

Tensors = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Check:
    """Numbers for a graph's placeholders, and how far two graphs' outputs may be apart.

    tensors: weight or step input name -> tensor; the checkpoint's weights are enough, those that
        passes invent are made by their recipes. Step inputs of the later passes (slot_mapping.0,
        k_cache.3, ...) are asked for only once a graph has them. They must describe the same
        packed batch as input_ids and position_ids, of whole requests.
    tolerance: largest relative RMS error that a pass may cause, and the share of rows that it is
        taken over, see relative_rms.
    """

    tensors: Tensors
    tolerance: float
    share: float = 1.0

    def run(self, gm: GraphModule) -> torch.Tensor:
        """The graph's first output, [1, T or R, vocab]."""
        with torch.no_grad():
            return first_output(Interpreter(gm).run(*self.inputs(gm)))

    def inputs(self, gm: GraphModule) -> list[torch.Tensor]:
        """A tensor for each placeholder; step inputs are copies."""
        return _inputs(gm, self.tensors)

    def error(self, before: torch.Tensor, after: torch.Tensor) -> float:
        """Relative RMS error of outputs; where only some rows were asked for, of those."""
        return relative_rms(*self._same_rows(before, after), self.share)

    def first_difference(self, before: GraphModule, after: GraphModule) -> str:
        """The first node of both graphs whose values leave the tolerance, with its source."""
        reference = _record(before, self.tensors)
        values = _record(after, self.tensors)
        for node in after.graph.nodes:
            if node.name not in reference or not isinstance(values.get(node.name), torch.Tensor):
                continue
            old, new = self._same_rows(reference[node.name], values[node.name])
            error = relative_rms(old, new) if old.shape == new.shape else float("inf")
            if not error <= self.tolerance:
                return f"first at {node.name} (error {error:.3g}){last_source_line(node)}"
        return "no node of both graphs differs: the difference is in the output itself"

    def _same_rows(
        self, before: torch.Tensor, after: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if before.dim() == 3 and before.shape != after.shape:
            indices = self.tensors("logits_indices")
            if after.shape[1] == indices.shape[0]:
                return before.index_select(1, indices), after
        return before, after


def first_output(output: Any) -> torch.Tensor:
    """What a graph gives, or the first of what it gives."""
    return output[0] if isinstance(output, list | tuple) else output


def relative_rms(before: torch.Tensor, after: torch.Tensor, share: float = 1.0) -> float:
    """RMS of the difference over RMS of the first, in float64; NaN where either is not finite.

    share: of the rows (all dimensions but the last), those with the least difference.
    """
    if before.shape != after.shape:
        return float("inf")
    wide, other = before.double(), after.double()
    squares = (wide - other).square()
    if share < 1.0:
        by_row = squares.flatten(0, -2).mean(-1).sort().values  # NaN comes last
        if bool(by_row.isnan().any()):
            return float("nan")
        squares = by_row[: max(int(share * len(by_row)), 1)]
    return float(squares.mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-30))


def _inputs(gm: GraphModule, tensors: Tensors) -> list[torch.Tensor]:
    make: Callable[[str], torch.Tensor] = WeightMaker(gm.meta["recipes"], tensors)
    inputs = []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = make(placeholder_key(node))
        # Attention writes its caches: each run starts from the given ones.
        inputs.append(value.clone() if "input" in node.meta else value)
    return inputs


def _record(gm: GraphModule, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Every node's value by the node's name."""
    values: dict[str, torch.Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                values[n.name] = result
            return result

    with torch.no_grad():
        Recorder(gm).run(*_inputs(gm, tensors))
    return values
