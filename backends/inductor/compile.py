"""One segment -> one AOTInductor package, weights as arguments.

Run as a worker process: `python -m inlay.backends.inductor.compile`, see workers.py.
Pointwise `inlay.*` ops are traced as their references, so that Inductor fuses them. On a CPU linear
layers and mixtures of experts become our C++ ops on prepacked weights, which come in as handles; on
CUDA plain products are cuBLAS's, and the others stay `inlay.*` ops, which the package calls through
torch's dispatcher: there they are our Triton kernels.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch.fx import GraphModule, Interpreter, Node

from inlay.backends.graph_json import graph_from_json
from inlay.backends.kernels.cpu_ops import load_ops
from inlay.backends.segment_arguments import example_arguments
from inlay.backends.worker_pool import serve
from inlay.errors import BuildError
from inlay.passes.graph import bind, is_call
from inlay.passes.ops import REFERENCES

LINEAR = torch.ops.inlay.linear.default
LINEARS = {
    LINEAR: "linear",
    torch.ops.inlay.int8_linear.default: "int8",
    torch.ops.inlay.fp8_linear.default: "weight_only",
    torch.ops.inlay.weight_only_linear.default: "weight_only",
}
"""Linear layers -> how their weights are packed."""
EXPERTS = torch.ops.inlay.experts.default
QUANTIZED_EXPERTS = torch.ops.inlay.quantized_experts.default
PRODUCTS = (*LINEARS, EXPERTS, QUANTIZED_EXPERTS)


@dataclass(frozen=True)
class Packing:
    """What a weight becomes at load.

    kind: "linear", "int8", "weight_only", "experts" and "quantized_experts" become handles,
    "halves" has every second column first: what belongs to interleaved experts.
    """

    kind: str
    transposed: bool = False
    interleaved: bool = False
    activations: str = ""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The handle, or the tensor with all of the gate's columns before all of up's."""
        ops = torch.ops.inlay_cpu
        if self.kind == "halves":
            return torch.cat((weight[..., ::2], weight[..., 1::2]), dim=-1)
        if self.kind == "experts":
            return ops.pack_experts(weight, self.transposed, self.interleaved)
        if self.kind == "quantized_experts":
            return ops.pack_quantized_experts(weight, self.activations, self.interleaved)
        return getattr(ops, f"pack_{self.kind}")(weight)

    def example(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A stand-in for export: what it holds is never read."""
        if self.kind == "halves":
            return torch.ones(shape).to(dtype)
        return torch.zeros(4, dtype=torch.int64)


def packed_weights(gm: GraphModule) -> dict[int, Packing]:
    """The weights to pack at load, by index: those that only products of one kind read."""
    weights = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]
    found = {}
    for index, node in enumerate(weights):
        uses = {_use(user, node) for user in node.users}
        if len(uses) == 1 and (packing := uses.pop()):
            found[index] = packing
    return found


def _use(user: Node, weight: Node) -> Packing | None:
    """How this user wants the weight packed; None where it reads it as it is."""
    if not is_call(user, *PRODUCTS):
        return None
    bound = bind(user)
    slots = [name for name, value in bound.items() if value is weight]
    if is_call(user, *LINEARS):
        shape, _ = weight.meta["spec"]
        kind = LINEARS[user.target]
        return Packing(kind) if slots == ["weight"] and len(shape) == 2 else None
    interleaved = bound["interleaved"]
    if slots in (["up"], ["down"]):
        interleaved = interleaved and slots == ["up"]
        if is_call(user, EXPERTS):
            return Packing("experts", bound["transposed"], interleaved)
        return Packing("quantized_experts", False, interleaved, bound["activations"])
    if slots in (["up_bias"], ["up_scale"], ["up_zero"]) and interleaved:
        return Packing("halves")
    return None


class _Traced(Interpreter):
    """Runs a segment so that export sees aten ops and products that are kernels of ours."""

    def __init__(self, gm: GraphModule, opaque: Collection[Any]) -> None:
        super().__init__(gm)
        self._opaque = opaque

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        traced = target if target in self._opaque else REFERENCES.get(target, target)
        return traced(*args, **kwargs)


class _Dispatched(torch.nn.Module):
    """A segment for a device whose kernels of ours are found by torch's dispatcher."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        self.interpreter = _Traced(gm, {target for target in PRODUCTS if target is not LINEAR})

    def forward(self, *args: torch.Tensor) -> Any:
        return self.interpreter.run(*args)


class _Segment(torch.nn.Module):
    """A segment for the CPU."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        packed = packed_weights(gm)
        weights = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]
        handles = {weights[index]: packing.kind for index, packing in packed.items()}
        for node in gm.graph.nodes:
            if is_call(node, *LINEARS) and handles.get(bind(node)["weight"]):
                _use_handle(node)
            elif is_call(node, EXPERTS, QUANTIZED_EXPERTS):
                _use_handles(node, handles)
        self.interpreter = _Traced(gm, ())

    def forward(self, *args: torch.Tensor) -> Any:
        return self.interpreter.run(*args)


def _use_handle(node: Node) -> None:
    """Make a linear layer's call one of the C++ op of the same name."""
    bound = bind(node)
    weight = bound.pop("weight")
    out_features = weight.meta["spec"][0][0]
    node.target = getattr(torch.ops.inlay_cpu, node.target._opname).default
    node.args, node.kwargs = (), {**bound, "handle": weight, "out_features": out_features}


def _use_handles(node: Node, handles: dict[Node, str]) -> None:
    """Make an experts call one of the C++ op, whose layout was settled when it was packed."""
    bound = bind(node)
    quantized = is_call(node, QUANTIZED_EXPERTS)
    kind = "quantized_experts" if quantized else "experts"
    wanted = {"up": kind, "down": kind}
    if bound.pop("interleaved"):
        beside = [name for name in ("up_bias", "up_scale", "up_zero") if bound.get(name)]
        wanted |= dict.fromkeys(beside, "halves")
    bound.pop("transposed", None)
    for name, one in wanted.items():
        if handles.get(bound[name]) != one:
            raise BuildError(
                f"the experts' {name} ({bound[name]}) is not a weight that only experts of one "
                "layout read, so it cannot be packed; use backend='eager'"
            )
    node.target = getattr(torch.ops.inlay_cpu, kind).default
    node.args, node.kwargs = (), bound


def _stand_ins(gm: GraphModule) -> dict[int, torch.Tensor]:
    """What packed weights are exported as."""
    weights = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "weight"]
    return {
        index: packing.example(*weights[index].meta["spec"])
        for index, packing in packed_weights(gm).items()
    }


def compile_segment(
    graph: dict[str, Any],
    package: Path,
    optimization_level: int,
    device: str = "cpu",
    is_dispatched: bool | None = None,
) -> None:
    """Compile a segment's JSON graph into an AOTInductor package at this path.

    is_dispatched: weights come as they are, and products go through torch's dispatcher; None:
        everywhere but on the CPU.
    """
    gm = graph_from_json(graph)
    if is_dispatched is None:
        is_dispatched = device != "cpu"
    arguments, dynamic = example_arguments(gm, {} if is_dispatched else _stand_ins(gm), device)
    with torch.no_grad():
        # What export cannot prove of the sizes is checked at run time: it is often true, as
        # T * min(64, 64 * T) == 64 * T of a sum over experts.
        program = torch.export.export(
            _Dispatched(gm) if is_dispatched else _Segment(gm),
            arguments,
            dynamic_shapes=(dynamic,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs=inductor_config(optimization_level, device),
        )


def inductor_config(optimization_level: int, device: str = "cpu") -> dict[str, Any]:
    """Inductor's settings.

    Threads are asked at run time, not baked into the package. The level is the C++ compiler's for
    the host code, which only calls kernels but takes half of its time; kernels always get -O3.
    Precompiled headers take longer to make than a handful of segments gains from them. On CUDA the
    maximum of a wide row is not taken in two steps, see `kernels/triton/register.py`; and at level
    3 plain products are timed during the build, cuBLAS's beside Inductor's Triton templates.
    """
    options = {
        "cpp.dynamic_threads": True,
        "aot_inductor.compile_wrapper_opt_level": f"O{optimization_level}",
        "aot_inductor.precompile_headers": False,
        "aot_inductor.enable_line_tables": False,  # not in torch 2.11
    }
    if device == "cuda":
        options["split_reductions"] = False
        if optimization_level == 3:
            options |= {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """A request of workers.py."""
    if job["ops"] is not None:
        load_ops(Path(job["ops"]))
    graph = json.loads(Path(job["graph"]).read_text())
    compile_segment(graph, Path(job["package"]), job["optimization_level"], job["device"])
    return {}


if __name__ == "__main__":
    serve(compile_job)
