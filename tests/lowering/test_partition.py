"""Programs: segments that are shared between layers, KV groups, names that connect."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from inlay import compile_model
from inlay.backends.graph_json import graph_key, graph_to_json
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.backends.step import StepRequest, build_step
from inlay.errors import UnsupportedModelError
from inlay.lowering.capture import capture
from inlay.lowering.partition import _size_from, partition
from inlay.passes.graph import calls
from inlay.passes.pass_manager import run_passes
from tests.toys import TOYS, build_toy


@functools.cache
def parts(name: str, **options: Any) -> tuple[Program, dict[str, GraphModule]]:
    model = build_toy(name, **options)
    captured = capture(model, 64)
    run_passes(captured.graph)
    return partition(captured.graph, torch.float32)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_layers_share_their_segments(name: str) -> None:
    few, many = parts(name, layers=2)[0], parts(name, layers=5)[0]
    # First, middle, tail and LM head; gemma2's windows are the attention's matter, not theirs.
    assert len(few.segment_keys) == 4
    assert many.segment_keys == few.segment_keys
    uses = [step.segment for step in many.segment_steps]
    assert [uses.count(key) for key in many.segment_keys] == [1, 4, 1, 1]
    # Each use has weights of its own.
    names = [name for step in many.segment_steps[1:-2] for name in step.weights]
    assert len(set(names)) == len(names) == 4 * len(many.segment_steps[1].weights)


@pytest.mark.parametrize("name", sorted(TOYS))
def test_values_are_made_before_they_are_read_and_weights_are_the_segments(name: str) -> None:
    program, segments = parts(name)
    known = {"input_ids", "position_ids", "logits_indices"}
    for step in program.steps:
        if isinstance(step, SegmentStep):
            assert known >= set(step.inputs)
            placeholders = segments[step.segment].graph.find_nodes(op="placeholder")
            weights = [node for node in placeholders if "weight" in node.meta]
            assert len(weights) == len(step.weights)
            assert len(placeholders) == len(step.weights) + len(step.inputs)
            assert placeholders[: len(weights)] == weights, "weights come first"
            known |= set(step.outputs)
        else:
            assert known >= {step.query, step.key, step.value}
            known.add(step.output)
    assert {program.hidden, program.logits} <= known
    assert program.vocab_size == 128
    assert set(segments) == set(program.segment_keys)
    for key, segment in segments.items():
        assert graph_key(graph_to_json(segment)) == key


def test_what_segments_hand_to_each_other_is_dense() -> None:
    """They are compiled for dense inputs and do not look at strides: llama's cos and sin, which
    the first layer's segment makes as views for all later ones, have gaps."""
    program, segments = parts("llama", layers=3)
    read = {name for step in program.segment_steps for name in step.inputs}
    made_dense = []
    for step in program.segment_steps:
        outputs = next(iter(segments[step.segment].graph.find_nodes(op="output"))).args[0]
        for name, node in zip(step.outputs, outputs, strict=True):
            value = node.meta["val"]
            dense = torch.empty_like(value, memory_format=torch.contiguous_format)
            assert name not in read or value.stride() == dense.stride(), name
            if node.target is torch.ops.aten.contiguous.default:
                made_dense.append(name)
    assert made_dense


@pytest.mark.parametrize("name", ["gemma3n_text", "llama"])
def test_what_segments_are_given_is_dense(name: str) -> None:
    """As it is when they run; gemma3n has a view behind an in-place op, whose strides export does
    not know."""
    model = compile_model(build_toy(name), "eager", dtype="float32", block_size=16).load_model()
    steps = model.program.steps
    read = {name for step in steps if isinstance(step, SegmentStep) for name in step.inputs}
    seen = []

    def observe(index: int, values: list[torch.Tensor]) -> list[torch.Tensor]:
        step = steps[index]
        if isinstance(step, SegmentStep):
            for output, value in zip(step.outputs, values, strict=True):
                assert output not in read or value.is_contiguous(), (output, value.stride())
                seen.append(output)
        return values

    model.observer = observe
    model.allocate_kv_cache(4)
    tables = [[0, 1]] * len(model.kv_groups)
    model.forward(build_step([StepRequest(range(20), 0, tables)], 16))
    assert len(seen) > len(steps) // 2


@pytest.mark.parametrize("name", sorted(TOYS))
def test_the_lm_head_is_a_step_of_its_own(name: str) -> None:
    program, _ = parts(name)
    *_, tail, head = program.steps
    assert isinstance(tail, SegmentStep)
    assert isinstance(head, SegmentStep)
    assert program.hidden in tail.outputs
    assert program.hidden in head.inputs
    assert "logits_indices" in head.inputs
    assert head.outputs == (program.logits,)
    assert not any("logits_indices" in step.inputs for step in program.segment_steps[:-1])


def test_attention_steps_hold_the_layers_facts() -> None:
    program, _ = parts("gemma2")
    assert [step.layer for step in program.attention_steps] == [0, 1, 2]
    assert [step.window for step in program.attention_steps] == [8, 0, 8]
    assert [step.group for step in program.attention_steps] == [0, 1, 0]
    step = program.attention_steps[0]
    assert (step.num_heads, step.num_kv_heads, step.head_dim, step.v_head_dim) == (4, 2, 24, 24)
    assert (step.softcap, step.scale, step.causal) == (50.0, 24**-0.5, True)
    assert {step.group for step in parts("mistral")[0].attention_steps} == {0}


def test_a_program_is_json() -> None:
    for name in ("llama", "gemma2"):
        program = parts(name)[0]
        assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_a_broken_program_is_an_error_and_not_a_program() -> None:
    data = parts("llama")[0].to_json()
    kinds = [step["kind"] for step in data["steps"]]
    assert kinds.count("attention") == 2
    for change in (
        {"steps": [{"kind": "magic"}]},
        {"steps": [{"kind": "attention"}]},
        {"unknown": 1},
    ):
        with pytest.raises((KeyError, TypeError)):
            Program.from_json({**data, **change})


def test_weights_in_order_of_use() -> None:
    sinks = AttentionStep(0, 0, 0, "q", "k", "v", "o", 1, 1, 8, 8, 1.0, sinks="sinks")
    one = SegmentStep("a", ("w", "shared"), (), ("q", "k", "v"))
    two = SegmentStep("a", ("shared", "x"), ("o",), ("y",))
    program = Program((one, sinks, two), "o", "y", "float32", 3)
    assert program.weight_names == ("w", "shared", "sinks", "x")
    assert program.segment_keys == ("a",)


def test_a_size_that_no_tensor_at_hand_has() -> None:
    model = build_toy("llama", layers=1)
    captured = capture(model, 64)
    run_passes(captured.graph)
    graph = captured.graph.graph
    node = calls(captured.graph, torch.ops.inlay.paged_attention.default)[0]
    with graph.inserting_after(node):
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
    size.meta["val"] = "s99"
    with pytest.raises(UnsupportedModelError, match=r"the size s99 that .* is not the size"):
        _size_from([node], size, graph, {})
