"""Small helpers over the graph that passes rewrite.

Form of a graph: an `fx.GraphModule` without state. Every tensor comes in by a placeholder whose
meta says what it is: `meta["weight"]` names a weight, `meta["input"]` a step input. Each node's
`meta["val"]` is its fake value, so shapes and dtypes can be asked without running anything.
`gm.meta["recipes"]` says how weights that passes invented are made of the checkpoint's
(see weights.py); `gm.meta["modules"]` maps the captured modules' names to their class names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, statically_known_true

import inlay.passes.ops  # noqa: F401  (defines torch.ops.inlay for every pass)

aten = torch.ops.aten

MAYBE_COPIES = (
    aten.reshape.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.to.dtype,
    aten.to.device,
    aten._unsafe_view.default,
)
"""Ops that give their argument itself where they have nothing to do."""


def is_call(value: Any, *targets: Any) -> bool:
    """Whether value is a call of one of these op overloads."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def calls(gm: GraphModule, *targets: Any) -> list[Node]:
    """All calls of these op overloads, in graph order."""
    return [node for node in gm.graph.nodes if is_call(node, *targets)]


def fake(node: Node) -> torch.Tensor:
    """The fake value of a node that yields one tensor: its shape and dtype."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor), f"{node.name} does not yield a tensor"
    return value


def strip_cast(value: Any) -> Any:
    """What a dtype cast was made of, or the value itself: float32 captures have no casts.

    One cast only: to a narrow dtype and back is a rounding, which changes numbers.
    """
    return value.args[0] if is_call(value, aten.to.dtype) else value


def operands(node: Node) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Both orders of a binary op's arguments, for patterns that do not care."""
    left, right = node.args[:2]
    return (left, right), (right, left)


def insert_call(graph: Graph, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new call in front of a node, with its fake value computed from its arguments'.

    Inherits the source position and module stack of the node it stands before.
    """
    name = target._schema.name.partition("::")[2] if hasattr(target, "_schema") else None
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, args, kwargs, name=name)
    refresh_val(node)
    for key in ("stack_trace", "nn_module_stack"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    return node


def refresh_val(node: Node) -> None:
    """Compute a call's fake value anew from its arguments'."""
    args = torch.fx.map_arg(node.args, lambda arg: arg.meta["val"])
    kwargs = torch.fx.map_arg(node.kwargs, lambda arg: arg.meta["val"])
    assert callable(node.target), f"{node.name} is not a call"
    with torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)


def replace(node: Node, replacement: Node) -> None:
    """Let all users of a node read another instead, and drop the node."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def bind(node: Node) -> dict[str, Any]:
    """A call's arguments by the names of its op's schema, defaults filled in."""
    arguments = node.target._schema.arguments
    bound = {argument.name: argument.default_value for argument in arguments}
    names = [argument.name for argument in arguments]
    return {**bound, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def add_weight(gm: GraphModule, name: str, recipe: dict[str, Any], val: torch.Tensor) -> Node:
    """A placeholder for a weight that a pass makes of others; the recipe says how."""
    node = _add_placeholder(gm, "weight", name, val.detach())
    gm.meta["recipes"][name] = recipe
    return node


def add_input(
    gm: GraphModule, name: str, shape: Sequence[int | str | torch.SymInt], dtype: torch.dtype
) -> Node:
    """A placeholder for a step input; a string in the shape is a symbolic size of that name."""
    mode = next(iter(gm.graph.nodes)).meta["val"].fake_mode
    sizes = [symbolic_size(gm, mode.shape_env, s) if isinstance(s, str) else s for s in shape]
    with mode:
        val = torch.empty(sizes, dtype=dtype)
    return _add_placeholder(gm, "input", name, val)


def _add_placeholder(gm: GraphModule, kind: str, name: str, val: torch.Tensor) -> Node:
    """After the others of its kind; a name that exists already is not added again."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        if node.meta.get(kind) == name:
            return node
    later = (node for node in gm.graph.nodes if node.op != "placeholder")
    if kind == "weight":
        later = (node for node in gm.graph.nodes if "weight" not in node.meta)
    with gm.graph.inserting_before(next(later)):
        node = gm.graph.placeholder(re.sub(r"\W", "_", name))
    # The target becomes an argument's name in the generated code, where it has to be unique.
    node.target = node.name
    node.meta.update({kind: name, "val": val})
    return node


def symbolic_size(gm: GraphModule, shape_env: ShapeEnv, name: str) -> torch.SymInt:
    """A symbolic size, the same for every input of this graph that names it."""
    symbols = gm.meta.setdefault("symbols", {})
    if name not in symbols:
        source = ConstantSource(name)
        # An odd hint, so that no other size is taken for this one by its value.
        hint = 7 + 2 * len(symbols)
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[name] = shape_env.create_symintnode(symbol, hint=hint, source=source)
    return symbols[name]


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two fake values have equal shapes, asked without adding guards on symbols."""
    if left.dim() != right.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True))


def erase_unused_weights(gm: GraphModule) -> None:
    """Drop the placeholders of weights that nothing reads any more; inputs stay."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if "weight" in node.meta and not node.users:
            gm.graph.erase_node(node)


def copy_graph(gm: GraphModule) -> GraphModule:
    """The same graph, to compare with after a pass: node names and meta are kept."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, lambda arg: copies[arg])
    result = GraphModule(torch.nn.Module(), graph)
    result.meta.update({**gm.meta, "recipes": dict(gm.meta["recipes"])})
    return result


def refuse(gm: GraphModule, node: Node, reason: str) -> None:
    """Note why a pass left something that looks like its pattern; the driver reports it."""
    gm.meta.setdefault("refusals", []).append((module_of(node), reason))


def placeholder_key(node: Node) -> str:
    """The name of the weight or step input that a placeholder stands for."""
    return node.meta.get("weight") or node.meta["input"]


def module_of(node: Node) -> str:
    """The innermost captured module that a node came from, "" where unknown."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def is_within(module: str, owner: str) -> bool:
    """Whether a module is another one or a part of it."""
    return not owner or module == owner or module.startswith(f"{owner}.")


def modules_named(gm: GraphModule, matches: Callable[[str], bool]) -> list[str]:
    """Names of the captured modules whose class name matches."""
    return [name for name, kind in gm.meta["modules"].items() if matches(kind)]


def last_source_line(node: Node) -> str:
    """ ", from FILE, line N: CODE" of the model's own code that made this node; "" if unknown."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    own = [index for index in places if "/torch/" not in lines[index]] or places
    return f", from {' '.join(lines[own[-1] : own[-1] + 2])}" if own else ""


def written_nodes(gm: GraphModule) -> set[Node]:
    """Tensors that are written into, and those that they share memory with."""
    written: set[Node] = set()
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        bound = bind(node)
        for argument in node.target._schema.arguments:
            one = bound[argument.name]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            while is_written and isinstance(one, Node) and one not in written:
                written.add(one)
                one = one.args[0] if _may_be_view(one) else None
    return written


def _may_be_view(node: Node) -> bool:
    """Whether a call's result may lie in its first argument's memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns[0].alias_info
    return returned is not None or is_call(node, *MAYBE_COPIES)
