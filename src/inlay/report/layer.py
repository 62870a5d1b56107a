"""The nodes of one decoder layer, from a captured graph or from a finished program."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.passes.graph import calls, is_within, module_of, placeholder_key
from inlay.report.fake_run import Graphs, run_program, symbols, weights_of

KINDS = {
    "product": "matrix product",
    "attention": "attention",
    "norm": "norm",
    "rope": "rotary position",
    "activation": "activation",
    "pointwise": "pointwise, reduction",
    "shape": "view, copy or cast",
    "edge": "from or to elsewhere",
}
"""Kind of a node -> what the legend calls it."""

_WORDS = {
    "product": r"linear|b?mm|addmm|matmul|baddbmm|einsum|conv\w*|\w*experts\w*|\w*grouped_mm\w*",
    "attention": r"\w*attention\w*",
    "norm": r"\w*norm",
    "rope": r"rope\w*",
    "activation": r"silu\w*|gelu\w*|relu\w*|sigmoid|tanh|softmax|_softmax|softplus|leaky_relu",
    "shape": r"_?(unsafe_)?view|_?reshape\w*|t|transpose|permute|(un)?squeeze|expand|slice|getitem|"
    r"type_as|cat|stack|split\w*|chunk|select|contiguous|clone|to|_to_copy|alias|index_select|sym_size|"
    r"repeat\w*|flatten|unflatten|unbind|detach\w*|lift_fresh\w*|embedding|narrow",
}


@dataclass(frozen=True)
class LayerNode:
    """One op of a layer, or an edge of it: a value from or to elsewhere.

    name: unique. op: as shown. kind: a key of KINDS. shape: of what it yields, "" where unknown.
    reads: weights with their shapes, and what it takes of the step. inputs: names of other nodes.
    """

    name: str
    op: str
    kind: str
    shape: str
    reads: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer's nodes in order of execution. title: which layer, and when."""

    title: str
    nodes: tuple[LayerNode, ...]

    @property
    def num_ops(self) -> int:
        return sum(node.kind != "edge" for node in self.nodes)


def op_name(target: Any) -> str:
    """As a reader knows it: "mul" of aten.mul.Tensor, "inlay.rms_norm" of our own."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).removeprefix("aten.")
        return name.rpartition(".")[0] or name
    return str(getattr(target, "__name__", target))


def kind_of(op: str) -> str:
    word = op.rpartition(".")[2]
    return next((kind for kind, form in _WORDS.items() if re.fullmatch(form, word)), "pointwise")


def decoder_layer(gm: GraphModule) -> str:
    """The middle decoder layer's module: of those with attention, the outermost numbered one.

    "" where there is none: then a layer is what lies between two attention calls.
    """
    owners = []
    for node in calls(gm, torch.ops.inlay.attention.default):
        stack = node.meta.get("nn_module_stack") or {}
        names = [name for name, _ in stack.values()]
        owners.append(next((name for name in names if name.rpartition(".")[2].isdigit()), ""))
    return owners[len(owners) // 2]


def layer_of_graph(gm: GraphModule, module: str, when: str) -> Layer | None:
    """All ops that came from a captured module, with the shapes of their fake values.

    None where the module is unknown ("").
    """
    if not module:
        return None
    names = {str(size): name for name, size in gm.meta.get("symbols", {}).items()}
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.meta.get("input") == "input_ids":
            names[str(node.meta["val"].shape[-1])] = "T"
    shape_of = _shapes({node: node.meta.get("val") for node in gm.graph.nodes}, names)
    inside: dict[Node, None] = {}
    for node in gm.graph.nodes:
        # An output of a tuple belongs where the tuple does.
        owner = node.args[0] in inside if node.target is operator.getitem else None
        within = is_within(module_of(node), module) if owner is None else owner
        if within and _is_drawn(node, shape_of):
            inside[node] = None
    reads = {n: f"{n.meta['weight']} {shape_of(n)}" for n in gm.graph.nodes if "weight" in n.meta}
    for node in gm.graph.find_nodes(op="placeholder"):
        name = node.meta.get("input", "position_ids")
        if name not in ("input_ids", "position_ids"):
            reads[node] = name
    nodes = _nodes(list(inside), reads, shape_of, _label)
    return Layer(f"{module}, {when}", tuple(nodes))


def layer_of_program(program: Program, graphs: Graphs) -> Layer:
    """The middle attention call and the segment that follows it, up to the next one."""
    places = [i for i, step in enumerate(program.steps) if isinstance(step, AttentionStep)]
    place = places[len(places) // 2]
    attention = program.steps[place]
    assert isinstance(attention, AttentionStep)
    segment = next(s for s in program.steps[place:] if isinstance(s, SegmentStep))
    tokens, rows, names = symbols()
    runs = run_program(program, graphs, tokens, rows)
    run = next(run for step, run in runs if step is segment)
    gm = graphs[segment.segment]
    shape_of = _shapes(run.values, names)
    reads = {
        node: f"{name} {shape_of(node)}"
        for node, name in zip(weights_of(gm), segment.weights, strict=True)
    }
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["kind"] == "input"]
    labels = dict(zip(inputs, segment.inputs, strict=True))
    inside = [node for node in gm.graph.nodes if _is_drawn(node, shape_of)]
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    shapes = {
        "query": f"[T, {num_heads}, {attention.head_dim}]",
        "key": f"[T, {num_kv_heads}, {attention.head_dim}]",
        "value": f"[T, {num_kv_heads}, {attention.v_head_dim}]",
    }
    sources = [LayerNode(f"{what} in", what, "edge", shape) for what, shape in shapes.items()]
    nodes = _nodes(inside, reads, shape_of, lambda node: f"from {labels[node]}")
    outer = {labels[n]: n.name for n in inputs}.get(attention.output)
    call = LayerNode(
        name=outer or "attention",
        op="inlay.paged_attention",
        kind="attention",
        shape=f"[T, {num_heads}, {attention.v_head_dim}]",
        reads=(f"paged KV cache of layer {attention.cache}", *attention.weights),
        inputs=tuple(source.name for source in sources),
    )
    rest = (node for node in nodes if node.name != outer)
    title = f"attention {attention.layer} and what follows, in the finished program"
    return Layer(title, (*sources, call, *rest))


def _nodes(
    inside: list[Node],
    reads: Mapping[Node, str],
    shape_of: Callable[[Node], str],
    label: Callable[[Node], str],
) -> Iterable[LayerNode]:
    """The ops, each after the edges it needs; an edge out for what others read.

    An edge is drawn again for each op that reads it, near to it; only the layer's own input, which
    the first op reads, is one box with all its wires.
    """
    members = set(inside)
    edges: set[str] = set()
    first = inside[0].all_input_nodes if inside else []
    for node in inside:
        inputs = []
        for arg in node.all_input_nodes:
            if arg in reads or not shape_of(arg):
                continue
            name = arg.name
            if arg not in members:
                name = arg.name if arg in first else f"{arg.name} for {node.name}"
                if name not in edges:
                    edges.add(name)
                    yield LayerNode(name, label(arg), "edge", shape_of(arg))
            inputs.append(name)
        op = op_name(node.target)
        yield LayerNode(
            name=node.name,
            op=f"{op} {node.args[1]}" if node.target is operator.getitem else op,
            kind=kind_of(op),
            shape=shape_of(node),
            reads=tuple(reads[arg] for arg in node.all_input_nodes if arg in reads),
            inputs=tuple(inputs),
        )
        outside = [user for user in node.users if user not in members]
        if any(user.op == "output" or _is_drawn(user, shape_of) for user in outside):
            yield LayerNode(f"{node.name} out", "out", "edge", "", inputs=(node.name,))


def _is_drawn(node: Node, shape_of: Callable[[Node], str]) -> bool:
    """Ops that yield tensors: not sizes, and not the checks that torch.export puts in."""
    return node.op == "call_function" and bool(shape_of(node))


def _label(node: Node) -> str:
    return placeholder_key(node) if node.op == "placeholder" else f"from {node.name}"


def _shapes(values: Mapping[Node, Any], names: Mapping[str, str]) -> Callable[[Node], str]:
    """How to write a node's shape, "" of what is no tensor; names: symbolic sizes -> letters."""

    def size(extent: Any) -> str:
        return re.sub(r"[a-z]\w*", lambda match: names.get(match[0], match[0]), str(extent))

    def shape_of(node: Node) -> str:
        value = values.get(node)
        if isinstance(value, torch.Tensor):
            return f"[{', '.join(size(extent) for extent in value.shape)}]"
        if isinstance(value, list | tuple):
            return f"{len(value)} tensors"
        return ""

    return shape_of
