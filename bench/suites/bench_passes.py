"""Each pass on the graph that those before it have left, of a llama of four small layers."""

from __future__ import annotations

from typing import Any

import pytest
from torch.fx import GraphModule

from inlay.lowering.capture import capture
from inlay.passes.graph import copy_graph
from inlay.passes.pass_manager import PASSES, run_passes
from tests.toys import build_toy


@pytest.fixture(scope="module")
def graphs() -> dict[str, GraphModule]:
    """The graph before each pass."""
    gm, before = capture(build_toy("llama", layers=4), 256, 256).graph, {}
    for one in PASSES:
        before[one.name] = copy_graph(gm)
        run_passes(gm, [one])
    return before


@pytest.mark.parametrize("name", [one.name for one in PASSES])
def bench_pass(benchmark: Any, graphs: dict[str, GraphModule], name: str) -> None:
    benchmark.group = "passes"
    (one,) = (one for one in PASSES if one.name == name)

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (copy_graph(graphs[name]), [one]), {}

    benchmark.pedantic(run_passes, setup=fresh, rounds=5, warmup_rounds=1)
