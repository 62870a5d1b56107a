"""The captured, fused graph on disk: what new weights are put through without tracing again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from inlay.backends.artifact import CONSTANTS, GRAPH, Artifact, save_tensors, write_json
from inlay.backends.graph_json import graph_from_json, graph_to_json
from inlay.lowering.export import Captured
from inlay.passes.graph import fake, module_of, placeholder_key, refresh_val, symbolic_size
from inlay.passes.weights import leaves

Tensors = Mapping[str, torch.Tensor]


def own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name they have."""
    return {
        **{n: p.data for n, p in model.named_parameters(remove_duplicate=False)},
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def write_graph(directory: Path, captured: Captured, model: PreTrainedModel) -> None:
    """Write a graph before quantization, and those of its tensors that the model does not have by
    a name: numbers that tracing took from its code."""
    gm = captured.graph
    placeholders = gm.graph.find_nodes(op="placeholder")
    needed = needed_of(gm)
    own = own_tensors(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    data = {
        **graph_to_json(gm),
        "placeholders": [placeholder_key(node) for node in placeholders],
        "modules": [module_of(node) for node in gm.graph.nodes],
        "module_classes": gm.meta["modules"],
        "strided": [i for i, node in enumerate(gm.graph.nodes) if _is_strided(node)],
        "recipes": gm.meta["recipes"],
        "max_num_tokens": captured.max_num_tokens,
        "sources": {name: _describe(captured.sources[name]) for name in needed if name in own},
        "parameters": list(parameters),
    }
    write_json(directory / GRAPH, data)
    constants = {n: captured.sources[n].contiguous().clone() for n in needed if n not in own}
    save_tensors(constants, directory / CONSTANTS)


def needed_of(gm: GraphModule) -> list[str]:
    """The tensors that a graph's weights are made of, by the names they were captured with."""
    names = [node.meta["weight"] for node in gm.graph.find_nodes(op="placeholder")
             if "weight" in node.meta]  # fmt: skip
    return list(dict.fromkeys(leaf for n in names for leaf in leaves(n, gm.meta["recipes"])))


def _is_strided(node: Node) -> bool:
    """Whether a call's tensor has gaps in memory, or its dimensions in another order."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    dense = torch.empty_like(value, memory_format=torch.contiguous_format).stride()
    return value.stride() != dense


def _with_gaps(value: torch.Tensor, strided: bool) -> torch.Tensor:
    if strided:
        return value.new_empty((*value.shape, 2))[..., 0]
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _describe(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def read_graph(artifact: Artifact, own: Tensors) -> Captured:
    """The graph again, over these tensors of a model; see `mismatches` for whether they fit.

    Values of the nodes are computed anew; module names are kept, source lines are not. Where
    strides were not what they are computed to be (passes that take a transposition out leave those
    of before), they are so again: where the graph is cut depends on them.
    """
    data = artifact.json(GRAPH)
    gm = graph_from_json(data)
    gm.meta.update({"recipes": data["recipes"], "modules": data["module_classes"], "symbols": {}})
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)  # as export
    placeholders, strided = iter(data["placeholders"]), set(data["strided"])
    for index, (node, module) in enumerate(zip(gm.graph.nodes, data["modules"], strict=True)):
        if module:
            node.meta["nn_module_stack"] = {module: (module, data["module_classes"].get(module))}
        if node.op == "placeholder":
            shape, dtype = node.meta.pop("spec")
            node.meta[node.meta.pop("kind")] = next(placeholders)
            sizes = [
                symbolic_size(gm, mode.shape_env, n) if isinstance(n, str) else n for n in shape
            ]
            with mode:
                node.meta["val"] = torch.empty(sizes, dtype=dtype)
        elif node.op == "call_function":
            refresh_val(node)
            if _is_strided(node) != (index in strided):
                node.meta["val"] = _with_gaps(fake(node), index in strided)
    sources = {**own, **load_file(artifact.path / CONSTANTS)}
    return Captured(gm, sources, max_num_tokens=data["max_num_tokens"])


def mismatches(artifact: Artifact, model: PreTrainedModel, own: Tensors) -> list[str]:
    """What a model has other than the one the artifact was made of, weight by weight."""
    data = artifact.json(GRAPH)
    expected = data["sources"]
    missing = [f"{name} is missing" for name in expected if name not in own]
    differing = [
        f"{name} is {_words(_describe(own[name]))} instead of {_words(due)}"
        for name, due in expected.items()
        if name in own and _describe(own[name]) != due
    ]
    known = {*data["parameters"], *expected}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [*differing, *missing, *(f"{n} is left over" for n in names if n not in known)]


def _words(facts: list[Any]) -> str:
    shape, dtype = facts
    return f"{dtype} {shape}"
