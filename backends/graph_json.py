"""A segment's graph as JSON of our own, and back: no pickle in an artifact.

Nodes are numbered in order, so equal structure gives equal text: its hash is the segment's key.
Placeholders carry shape and dtype; a symbolic dimension is written as a letter of its own.
"""

from __future__ import annotations

import hashlib
import json
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from inlay.errors import ArtifactError

OPERATORS = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
}
_OPERATOR_NAMES = {function: name for name, function in OPERATORS.items()}
_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)
SYMBOLS = "TRBSUVWXYZ"
NAMESPACES = ("aten", "inlay")
"""Op namespaces a graph may call: nothing else can be named in an artifact."""


def graph_to_json(gm: GraphModule) -> dict[str, Any]:
    """Nodes of a stateless graph, numbered; raises AssertionError on what cannot be written."""
    number: dict[Node, int] = {}
    symbols: dict[str, str] = {}
    nodes: list[dict[str, Any]] = []
    for node in gm.graph.nodes:
        number[node] = len(nodes)
        if node.op == "placeholder":
            kind = "weight" if "weight" in node.meta else "input"
            nodes.append({"op": kind, **_describe(node.meta["val"], symbols)})
        elif node.op == "output":
            nodes.append({"op": "output", "args": _encode(node.args[0], number)})
        else:
            assert node.op == "call_function", f"{node.op} node {node.name} in a segment"
            nodes.append(
                {
                    "op": _target_name(node.target),
                    "args": _encode(node.args, number),
                    "kwargs": {key: _encode(arg, number) for key, arg in node.kwargs.items()},
                }
            )
    return {"nodes": nodes}


def graph_key(data: dict[str, Any]) -> str:
    """A segment's identity: equal for structurally equal graphs."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def graph_from_json(data: dict[str, Any]) -> GraphModule:
    """The graph again; placeholders keep meta["spec"] = (shape with letters, dtype).

    Raises:
        ArtifactError: an op or a dtype that this installation does not know.
    """
    graph = Graph()
    nodes: list[Node] = []
    for entry in data["nodes"]:
        op = entry["op"]
        if op in ("weight", "input"):
            node = graph.placeholder(f"{op[0]}{len(nodes)}")
            node.meta["spec"] = (tuple(entry["shape"]), _constant(entry["dtype"]))
            node.meta["kind"] = op
        elif op == "output":
            node = graph.output(tuple(_decode(entry["args"], nodes)))
        else:
            args = tuple(_decode(entry["args"], nodes))
            kwargs = {key: _decode(arg, nodes) for key, arg in entry["kwargs"].items()}
            node = graph.call_function(_target(op), args, kwargs)
        nodes.append(node)
    return GraphModule(torch.nn.Module(), graph)


def _describe(value: torch.Tensor, symbols: dict[str, str]) -> dict[str, Any]:
    shape: list[int | str] = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
        else:
            shape.append(symbols.setdefault(str(size), SYMBOLS[len(symbols)]))
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def _target_name(target: Any) -> str:
    if target in _OPERATOR_NAMES:
        return _OPERATOR_NAMES[target]
    assert isinstance(target, torch._ops.OpOverload), f"{target} cannot be written"
    name = str(target)
    assert name.split(".")[0] in NAMESPACES, f"op {name} outside {NAMESPACES}"
    return name


def _target(name: str) -> Any:
    if name in OPERATORS:
        return OPERATORS[name]
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    try:
        if namespace not in NAMESPACES:
            raise AttributeError(namespace)
        return getattr(getattr(getattr(torch.ops, namespace), op), overload or "?")
    except AttributeError:
        raise ArtifactError(
            f"the graph calls op {name!r}, which torch {torch.__version__} and this inlay do not "
            "have; build the artifact again with `inlay build`"
        ) from None


def _constant(name: str) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, _TORCH_CONSTANTS):
        raise ArtifactError(
            f"the graph names torch.{name}, which is no dtype, layout or memory format of torch "
            f"{torch.__version__}; build the artifact again with `inlay build`"
        )
    return value


def _encode(value: Any, number: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return {"node": number[value]}
    if isinstance(value, list | tuple):
        return [_encode(item, number) for item in value]
    if isinstance(value, _TORCH_CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"float": str(value)}
    assert value is None or isinstance(value, bool | int | float | str), f"argument {value!r}"
    return value


def _decode(value: Any, nodes: list[Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    if "node" in value:
        return nodes[value["node"]]
    if "torch" in value:
        return _constant(value["torch"])
    if "device" in value:
        return torch.device(value["device"])
    return float(value["float"])
