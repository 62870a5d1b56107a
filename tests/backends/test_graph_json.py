"""A segment's graph as JSON and back: equal numbers, nothing but data, nothing but our ops."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Interpreter

from inlay.backends.graph_json import graph_from_json, graph_key, graph_to_json
from inlay.errors import ArtifactError
from inlay.lowering.capture import capture
from inlay.lowering.partition import partition
from inlay.passes.pass_manager import run_passes
from inlay.passes.weights import make_weight
from tests.passes.graphs import export
from tests.toys import build_toy

aten = torch.ops.aten


def reread(gm: GraphModule) -> GraphModule:
    return graph_from_json(json.loads(json.dumps(graph_to_json(gm))))


def run(gm: GraphModule, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(Interpreter(gm).run(*arguments))


def example(
    node: torch.fx.Node, sources: dict[str, torch.Tensor], recipes: dict[str, Any], size: int
) -> torch.Tensor:
    """A weight's own value, or random numbers of an input's shape."""
    value = node.meta["val"]
    shape = [extent if isinstance(extent, int) else size for extent in value.shape]
    if "weight" in node.meta:
        return make_weight(node.meta["weight"], recipes, sources.__getitem__)
    if not value.dtype.is_floating_point:
        return torch.randint(0, 2, shape, dtype=value.dtype)
    return torch.randn(shape, dtype=value.dtype)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_segments_give_equal_numbers_again(name: str) -> None:
    captured = capture(build_toy(name), 64)
    run_passes(captured.graph)
    recipes = captured.graph.meta["recipes"]
    _, segments = partition(captured.graph, torch.float32)
    for gm in segments.values():
        again = reread(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        kinds = ["weight" if "weight" in node.meta else "input" for node in placeholders]
        found = again.graph.find_nodes(op="placeholder")
        assert [node.meta["kind"] for node in found] == kinds
        for size in (2, 7):
            arguments = [example(node, captured.sources, recipes, size) for node in placeholders]
            for node, argument in zip(found, arguments, strict=True):
                shape, dtype = node.meta["spec"]
                assert dtype == argument.dtype
                letters = [extent for extent in shape if isinstance(extent, str)]
                assert [extent for extent in shape if extent not in letters] == [
                    extent
                    for extent, letter in zip(argument.shape, shape, strict=True)
                    if letter not in letters
                ]
            pairs = zip(run(gm, arguments), run(again, arguments), strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)


def graph_of(*calls: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> GraphModule:
    """x [T, 3] through one call after the other."""
    graph = Graph()
    value = graph.placeholder("x")
    value.meta.update(val=torch.empty(5, 3), input="x")
    for target, args, kwargs in calls:
        value = graph.call_function(target, (value, *args), kwargs)
        value.meta["val"] = torch.empty(5, 3)
    graph.output((value,))
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    "call",
    [
        (aten.clamp.default, (-math.inf, math.inf), {}),
        (aten.add.Scalar, (math.nan,), {}),
        (aten.to.dtype, (torch.bfloat16,), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (aten.full_like.default, (2.5,), {"dtype": torch.float64, "device": torch.device("cpu")}),
        (aten.view.default, ([-1, 1, 3],), {}),
        (aten.sum.dim_IntList, ([0], True), {}),
        (aten.gelu.default, (), {"approximate": "tanh"}),
    ],
    ids=str,
)
def test_every_kind_of_argument(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> None:
    gm = graph_of(call)
    x = torch.randn(5, 3)
    (expected,), (got,) = run(gm, [x]), run(reread(gm), [x])
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert graph_to_json(reread_with_meta(gm)) == graph_to_json(gm)


def reread_with_meta(gm: GraphModule) -> GraphModule:
    """As a graph that could be written again: placeholders with fake values."""
    again = reread(gm)
    for node in again.graph.find_nodes(op="placeholder"):
        shape, dtype = node.meta["spec"]
        node.meta.update(val=torch.empty(shape, dtype=dtype), input=node.name)
    return again


def test_the_key_is_the_structures_and_not_the_names() -> None:
    class Twice(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * self.factor + y

    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    one, other = (export(Twice(factor), x, y)[0] for factor in (2.0, 3.0))
    renamed = export(Twice(2.0), x, y)[0]
    for node in renamed.graph.nodes:
        node.name = f"renamed_{node.name}"
    keys = [graph_key(graph_to_json(gm)) for gm in (one, renamed, other)]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert len(keys[0]) == 16


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "os.system.default",
        "prim.device.default",
        "inductor.resize_storage_bytes_.default",
        "operator.methodcaller",
        "operator.attrgetter",
        "aten.no_such_op.default",
        "aten.add.no_such_overload",
        "aten.add",
        "aten",
        "inlay.no_such_op.default",
        "",
    ],
)
def test_an_op_that_is_not_ours_is_refused(name: str) -> None:
    data = graph_to_json(graph_of((aten.relu.default, (), {})))
    data["nodes"][1]["op"] = name
    with pytest.raises(
        ArtifactError, match=rf"calls op '{name}', which torch .* build the artifact"
    ):
        graph_from_json(data)


@pytest.mark.parametrize("name", ["load", "ops", "nn", "float33", "bfloat16.__class__"])
def test_constants_are_dtypes_layouts_and_formats_only(name: str) -> None:
    data = graph_to_json(graph_of((aten.to.dtype, (torch.float64,), {})))
    data["nodes"][1]["args"][1] = {"torch": name}
    with pytest.raises(ArtifactError, match=f"the graph names torch.{name}, which is no"):
        graph_from_json(data)
    data = graph_to_json(graph_of((aten.relu.default, (), {})))
    data["nodes"][0]["dtype"] = name
    with pytest.raises(ArtifactError, match=f"the graph names torch.{name}, which is no"):
        graph_from_json(data)


def test_what_cannot_be_written_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="cannot be written"):
        graph_to_json(graph_of((torch.relu, (), {})))
    with pytest.raises(AssertionError, match="outside"):
        graph_to_json(graph_of((torch.ops.prims.sin.default, (), {})))
    with pytest.raises(AssertionError, match="argument"):
        graph_to_json(graph_of((aten.add.Scalar, (1j,), {})))
