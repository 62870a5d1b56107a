"""Run a program on fake tensors: shapes and operation counts without weights or time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.passes.ops import REFERENCES

Graphs = Mapping[str, GraphModule]
"""Segments by key, as graph_from_json gives them."""

Size: TypeAlias = "int | torch.SymInt"


EXPERTS = (torch.ops.inlay.experts.default, torch.ops.inlay.quantized_experts.default)
"""Tokens [T, H], chosen experts [T, K], their weights, the experts' matrices [E, ...] in and out,
then options."""

NARROW = (
    torch.ops.inlay.int8_linear.default,
    torch.ops.inlay.fp8_linear.default,
    torch.ops.inlay.weight_only_linear.default,
)
"""Products whose references the counter cannot see through."""


@dataclass(frozen=True)
class SegmentRun:
    """A segment's call: what its nodes yielded, and the operations of its matrix products."""

    values: Mapping[Node, Any]
    outputs: tuple[torch.Tensor, ...]
    flops: int


class _Recorder(Interpreter):
    """Inlay's ops run as their references, whose products the counter can see.

    Experts are counted here: which of them a token meets is not known without numbers. So are
    products with narrow weights.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[Node, Any] = {}
        self.counted = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in EXPERTS or target in NARROW:
            result = target(*args, **kwargs)
            names = [argument.name for argument in target._schema.arguments]
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            is_narrow = target in NARROW
            self.counted += _narrow_flops(bound, result) if is_narrow else _experts_flops(bound)
            return result
        return REFERENCES.get(target, target)(*args, **kwargs)

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def run_program(
    program: Program, graphs: Graphs, num_tokens: Size, num_logits: Size
) -> Iterator[tuple[SegmentStep, SegmentRun]]:
    """Each segment call of a step with T tokens and R logits rows, in order.

    Both sizes may be symbolic, see `symbols`. Equal segments on equal shapes run once.
    """
    symbol = getattr(num_tokens, "node", None)
    shape_env = None if symbol is None else symbol.shape_env
    done: dict[Any, SegmentRun] = {}
    with FakeTensorMode(shape_env=shape_env), torch.no_grad():
        values = {
            "input_ids": torch.empty(1, num_tokens, dtype=torch.int64),
            "position_ids": torch.empty(1, num_tokens, dtype=torch.int64),
            "logits_indices": torch.empty(num_logits, dtype=torch.int64),
        }
        for step in program.steps:
            if isinstance(step, AttentionStep):
                query = values[step.query]
                shape = (query.shape[0], step.num_heads, step.v_head_dim)
                values[step.output] = query.new_empty(shape)
                continue
            inputs = [values[name] for name in step.inputs]
            key = step.segment, tuple(str((value.shape, value.stride())) for value in inputs)
            if key not in done:
                done[key] = _run_segment(graphs[step.segment], inputs)
            values.update(zip(step.outputs, done[key].outputs, strict=True))
            yield step, done[key]


def _run_segment(gm: GraphModule, inputs: list[torch.Tensor]) -> SegmentRun:
    weights = [torch.empty(shape, dtype=dtype) for shape, dtype in map(spec, weights_of(gm))]
    recorder = _Recorder(gm)
    with FlopCounterMode(display=False) as counter:
        outputs = recorder.run(*weights, *inputs)
    flops = counter.get_total_flops() + recorder.counted
    return SegmentRun(recorder.values, tuple(outputs), flops)


def _experts_flops(bound: Mapping[str, Any]) -> int:
    """2 operations for each weight of each expert that a token meets."""
    chosen, up, down = (bound[name] for name in ("top_k_index", "up", "down"))
    if any(isinstance(size, torch.SymInt) for size in chosen.shape):
        return 0  # a run for shapes alone
    bits = 2 if up.dtype == torch.uint8 else 1
    return 2 * bits * chosen.numel() * (up[0].numel() + down[0].numel())


def _narrow_flops(bound: Mapping[str, Any], result: torch.Tensor) -> int:
    """2 operations for each weight and token."""
    x = bound["x"] if "x" in bound else bound["q"]
    if any(isinstance(size, torch.SymInt) for size in x.shape):
        return 0  # a run for shapes alone
    return 2 * x.numel() * int(result.shape[-1])


def weights_of(gm: GraphModule) -> list[Node]:
    """A segment's weight placeholders, in the order of its steps' weight names."""
    return [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]


def spec(weight: Node) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a weight."""
    shape, dtype = weight.meta["spec"]
    return shape, dtype


def symbols() -> tuple[torch.SymInt, torch.SymInt, dict[str, str]]:
    """Symbolic T and R for run_program, and how to call them: torch's name -> ours."""
    shape_env, sizes = ShapeEnv(), []
    # Odd hints, so that no other size is taken for one of these by its value.
    for name, hint in (("T", 509), ("R", 61)):
        source = ConstantSource(name)
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes.append(shape_env.create_symintnode(symbol, hint=hint, source=source))
    return sizes[0], sizes[1], {str(sizes[0]): "T", str(sizes[1]): "R"}
