"""The guards must let a right graph and engine pass and catch each known mistake."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

from inlay.backends.artifact import Artifact
from inlay.backends.base import LoadedModel
from inlay.backends.eager.backend import EagerBackend
from inlay.backends.model import ProgramModel
from inlay.backends.program import SegmentStep
from inlay.backends.step import StepInputs
from inlay.engine import build
from inlay.errors import UnsupportedModelError, VerificationError
from inlay.lowering.capture import build_shell, capture
from inlay.lowering.export import Captured
from inlay.lowering.guards import (
    References,
    _schedule,
    check_capture,
    check_engine,
    in_float32,
    packed_check,
    reference_logits,
)
from inlay.lowering.options import CompileOptions
from inlay.passes.graph import bind, calls, copy_graph, insert_call
from tests.toys import build_toy

aten = torch.ops.aten
ATTENTION = torch.ops.inlay.attention.default
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def subject(name: str, dtype: str) -> tuple[Captured, References]:
    model = build_toy(name, DTYPES[dtype])
    captured = capture(model, max_num_tokens=64)
    return captured, reference_logits(model, captured, max_seq_len=256)


def check(name: str, dtype: str, change: Callable[[GraphModule], None] | None = None) -> float:
    """The error of the captured graph after a change made to it."""
    captured, references = subject(name, dtype)
    graph = copy_graph(captured.graph)
    if change is not None:
        change(graph)
        graph.graph.lint()
    changed = Captured(graph, captured.sources)
    return check_capture(changed, references, packed_check(changed, references, block_size=16))


def attentions(gm: GraphModule) -> list[Node]:
    """Attention calls with all their arguments by position."""
    nodes = calls(gm, ATTENTION)
    for node in nodes:
        node.args, node.kwargs = tuple(bind(node).values()), {}
    return nodes


def set_argument(number: int, change: Callable[[Any], Any]) -> Callable[[GraphModule], None]:
    def run(gm: GraphModule) -> None:
        for node in attentions(gm):
            node.update_arg(number, change(node.args[number]))

    return run


def ignore_borders(gm: GraphModule) -> None:
    """Positions that never restart: the second request sees the first."""
    for node in attentions(gm):
        ones = insert_call(gm.graph, node, aten.ones_like.default, node.args[3])
        node.update_arg(3, insert_call(gm.graph, node, aten.cumsum.default, ones, 0))


def remove_rope(gm: GraphModule) -> None:
    for target, value in ((aten.cos.default, aten.ones_like), (aten.sin.default, aten.zeros_like)):
        for node in calls(gm, target):
            node.replace_all_uses_with(insert_call(gm.graph, node, value.default, node.args[0]))


def forget_a_layer(gm: GraphModule) -> None:
    last = attentions(gm)[-1]
    last.replace_all_uses_with(attentions(gm)[0])


MISTAKES: dict[str, tuple[str, Callable[[GraphModule], None]]] = {
    "borders of requests ignored": ("llama", ignore_borders),
    "scale x 1.1": ("llama", set_argument(5, lambda scale: 1.1 * scale)),
    "not causal": ("llama", set_argument(9, lambda causal: False)),
    "no RoPE": ("llama", remove_rope),
    "a layer's attention is another's": ("llama", forget_a_layer),
    "window one too wide": ("mistral", set_argument(6, lambda window: window + 1)),
    "window one too narrow": ("mistral", set_argument(6, lambda window: window - 1)),
    "no window": ("mistral", set_argument(6, lambda window: 0)),
}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_graph_passes(name: str, dtype: str) -> None:
    _, references = subject(name, dtype)
    error = check(name, dtype)
    if dtype == "float32":
        assert references.noise == 0
        assert references.tolerance == 5e-5
        assert error < 1e-6
    else:
        assert 1e-3 < references.noise < 0.05
        assert error < references.noise * 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_is_caught(mistake: str, dtype: str) -> None:
    name, change = MISTAKES[mistake]
    with pytest.raises(VerificationError, match=r"captured graph does not compute what Hugging"):
        check(name, dtype, change)


def test_a_lost_soft_cap_is_caught_in_float32() -> None:
    # It costs these toys less than bfloat16's rounding does.
    with pytest.raises(VerificationError, match="captured graph"):
        check("gemma2", "float32", set_argument(7, lambda softcap: 0.0))


def test_one_request_is_longer_than_every_window() -> None:
    for name, window in (("mistral", 8), ("gemma2", 8)):
        lengths = [len(r.token_ids) for r in subject(name, "float32")[1].requests]
        assert lengths == [window + 11, 12]
    captured, _ = subject("llama", "float32")
    short = reference_logits(build_toy("llama"), captured, max_seq_len=7)
    assert [len(r.token_ids) for r in short.requests] == [7, 7]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = build_toy("llama", layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(VerificationError, match=r"float32 are not finite.*hold NaN or infinity"):
        reference_logits(model, capture(model, 64), 64)


def test_the_float32_reference_is_the_model_in_float32() -> None:
    narrow = build_toy("gemma2", torch.bfloat16, tie_word_embeddings=True)
    before = copy.deepcopy(narrow.state_dict())
    ids = torch.randint(0, 128, (1, 30))
    with torch.no_grad():
        wide = in_float32(build_shell(narrow, "eager"))(input_ids=ids, use_cache=False).logits
        expected = copy.deepcopy(narrow).float()(input_ids=ids, use_cache=False).logits
    # HF keeps a constant of gemma2 (sqrt(hidden_size)) in the dtype of the weights.
    torch.testing.assert_close(wide, expected, rtol=1e-4, atol=1e-4)
    for name, value in narrow.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name])


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    budget=st.integers(2, 30),
)
def test_the_engines_schedule(lengths: list[int], budget: int) -> None:
    steps = _schedule(lengths, budget)
    done = dict.fromkeys(range(len(lengths)), 0)
    for cuts in steps:
        assert cuts
        assert sum(end - begin for begin, end in cuts.values()) <= budget
        for index, (begin, end) in cuts.items():
            assert begin == done[index] < end <= lengths[index]
            done[index] = end
    assert list(done.values()) == lengths


def test_the_schedule_chunks_mixes_and_decodes() -> None:
    steps = _schedule([19, 12], 2048)
    assert steps[0] == {0: (0, 8)}
    assert steps[1] == {0: (8, 16), 1: (0, 9)}
    assert steps[2:] == [
        {0: (16, 17), 1: (9, 10)},
        {0: (17, 18), 1: (10, 11)},
        {0: (18, 19), 1: (11, 12)},
    ]


# --- the engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, References]:
    """Three layers with a window of 8, and what Hugging Face says."""
    model: PreTrainedModel = build_toy("mistral", layers=3)
    options = CompileOptions(backend="eager", dtype="float32", block_size=16, verify="capture")
    engine = build(model, tmp_path_factory.mktemp("guards") / "engine", options)
    references = reference_logits(model, capture(model, 64), 256)
    return engine.artifact, references


def load(artifact: Artifact) -> ProgramModel:
    model = EagerBackend().load(artifact)
    # Not mapped from the file, so that tests may change them.
    model._plan = [
        (step, segment, weights and [weight.clone() for weight in weights], dead)
        for step, segment, weights, dead in model._plan
    ]
    return model


def refuse(model: LoadedModel, references: References) -> None:
    with pytest.raises(VerificationError, match="the eager engine does not compute what"):
        check_engine(model, references, "the eager engine")


@pytest.mark.parametrize("budget", [2048, 6])
def test_a_right_engine_passes(mistral: tuple[Artifact, References], budget: int) -> None:
    model = load(mistral[0])
    model.limits = replace(model.limits, max_num_tokens=budget)
    assert check_engine(model, mistral[1], "it") < 5e-6


def test_one_wrong_weight(mistral: tuple[Artifact, References]) -> None:
    model = load(mistral[0])
    weights = next(w for _, _, w, _ in model._plan if w)
    norm = next(weight for weight in weights if weight.dim() == 1)
    norm[5] *= 2
    refuse(model, mistral[1])


def test_swapped_layers(mistral: tuple[Artifact, References]) -> None:
    model = load(mistral[0])
    middles = [i for i, entry in enumerate(model._plan) if isinstance(entry[0], SegmentStep)][1:3]
    first, second = (model._plan[index] for index in middles)
    assert first[0].segment == second[0].segment
    model._plan[middles[0]] = (*first[:2], second[2], first[3])
    model._plan[middles[1]] = (*second[:2], first[2], second[3])
    refuse(model, mistral[1])


class Changed:
    """A model whose steps are changed before it sees them."""

    def __init__(self, model: ProgramModel, change: Callable[[StepInputs], StepInputs]) -> None:
        self.limits, self.kv_groups, self.device = model.limits, model.kv_groups, model.device
        self.is_encoder = model.is_encoder
        self.kv_groups_for, self.kv_tensors = model.kv_groups_for, model.kv_tensors
        self.allocate_kv_cache = model.allocate_kv_cache
        self.forward = lambda step: model.forward(change(step))
        self.forward_hidden = lambda step: model.forward_hidden(change(step))


def other_requests_table(step: StepInputs) -> StepInputs:
    return replace(step, block_tables=step.block_tables.flip(1))


def slots_off_by_one(step: StepInputs) -> StepInputs:
    slots = step.slot_mapping
    return replace(step, slot_mapping=torch.where(slots >= 0, slots ^ 1, slots))


def forgotten_cache(step: StepInputs) -> StepInputs:
    new = step.query_start_loc.diff().to(step.seq_lens)
    return replace(step, seq_lens=torch.minimum(step.seq_lens, new))


def positions_from_zero(step: StepInputs) -> StepInputs:
    return replace(step, position_ids=torch.zeros_like(step.position_ids))


def other_rows(step: StepInputs) -> StepInputs:
    return replace(step, logits_indices=step.logits_indices.flip(0))


@pytest.mark.parametrize(
    "change",
    [other_requests_table, slots_off_by_one, forgotten_cache, positions_from_zero, other_rows],
)
def test_wrong_bookkeeping(
    mistral: tuple[Artifact, References], change: Callable[[StepInputs], StepInputs]
) -> None:
    refuse(Changed(load(mistral[0]), change), mistral[1])


def test_logits_that_are_not_numbers(mistral: tuple[Artifact, References]) -> None:
    model = load(mistral[0])
    next(w for _, _, w, _ in model._plan if w)[0].fill_(torch.nan)
    refuse(model, mistral[1])


def test_an_artifact_edited_behind_its_hashes_back(
    mistral: tuple[Artifact, References], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(mistral[0].path, tmp_path / "engine"))
    shard = next((place / "weights").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2 & ~3
    data[middle : middle + 4] = torch.tensor(3.0).numpy().tobytes()
    shard.write_bytes(data)
    refuse(EagerBackend().load(Artifact(place)), mistral[1])


def test_a_model_that_transformers_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_toy("llama", layers=1)
    captured = capture(model, 64)

    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("ne() received an invalid combination")

    monkeypatch.setattr(type(model.model), "forward", fail)
    with pytest.raises(
        UnsupportedModelError, match=r"own LlamaForCausalLM fails on 23 .*TypeError"
    ):
        reference_logits(model, captured, 64)
