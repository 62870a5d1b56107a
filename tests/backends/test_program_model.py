"""The interpreter of programs: KV groups, padding, chunks, and values that are freed early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inlay.backends.artifact import Artifact
from inlay.backends.eager.backend import EagerBackend
from inlay.backends.model import ProgramModel, last_uses
from inlay.backends.program import AttentionStep, Program, SegmentStep
from inlay.backends.step import StepRequest, build_step
from inlay.engine import build
from inlay.lowering.options import CompileOptions
from tests.toys import build_toy

BLOCK_SIZE = 16
NUM_BLOCKS = 12


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """gemma2: layers with a window of 8 and without one, so two KV groups."""
    path: Path = tmp_path_factory.mktemp("program") / "engine"
    options = CompileOptions(
        backend="eager", dtype="float32", block_size=BLOCK_SIZE, verify="capture"
    )
    return build(build_toy("gemma2"), path, options).artifact


@pytest.fixture
def model(artifact: Artifact) -> ProgramModel:
    model = EagerBackend().load(artifact)
    model.allocate_kv_cache(NUM_BLOCKS)
    for cache in tensors(model):
        cache.fill_(torch.nan)  # what is read without having been written shows
    return model


def tensors(model: ProgramModel) -> list[torch.Tensor]:
    return [cache for group in range(len(model.kv_groups)) for cache in model.kv_tensors(group)]


def request(ids: list[int], computed: int = 0, first: int = 0) -> StepRequest:
    """Blocks of its own in each group, in another order in the second."""
    blocks = list(range(first, first + 3))
    return StepRequest(ids, computed, [blocks, blocks[::-1]])


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128, (length,), generator=generator).tolist()


def test_groups_of_layers_that_keep_the_same_blocks(model: ProgramModel) -> None:
    windowed, full = model.kv_groups
    assert (windowed.window, windowed.num_layers) == (8, 2)
    assert (full.window, full.num_layers) == (0, 1)
    # Keys and values of 2 heads of 24 in float32.
    per_layer = 2 * (24 + 24) * BLOCK_SIZE * 4
    assert (windowed.bytes_per_block, full.bytes_per_block) == (2 * per_layer, per_layer)
    held = sum(cache.nbytes for cache in tensors(model))
    assert held == NUM_BLOCKS * 3 * per_layer
    assert model.dtype == torch.float32


def test_it_computes_what_hugging_face_computes(model: ProgramModel) -> None:
    reference = build_toy("gemma2")
    prompts = [prompt(21, 1), prompt(3, 2)]
    step = build_step([request(prompts[0]), request(prompts[1], first=4)], BLOCK_SIZE)
    logits = model.forward(step)
    assert logits.shape == (2, 128)
    for row, ids in zip(logits, prompts, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_chunks_and_decode_steps_give_the_whole_prompts_logits(model: ProgramModel) -> None:
    ids = prompt(21, 3)
    whole = model.forward(build_step([request(ids)], BLOCK_SIZE))[0]
    for cuts in ([(0, 21)], [(0, 1), (1, 17), (17, 21)], [(0, 20), (20, 21)]):
        model.allocate_kv_cache(NUM_BLOCKS)
        for begin, end in cuts:
            step = build_step([request(ids[begin:end], begin)], BLOCK_SIZE)
            last = model.forward(step)[0]
        torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_and_writes_nothing(model: ProgramModel) -> None:
    requests = [request(prompt(5, 4)), request(prompt(2, 5), first=4)]
    plain = model.forward(build_step(requests, BLOCK_SIZE))
    before = [cache.clone() for cache in tensors(model)]
    step = build_step(requests, BLOCK_SIZE, num_tokens=16, num_requests=5, num_logits=4)
    padded = model.forward(step)
    assert padded.shape == (4, 128)
    torch.testing.assert_close(padded[:2], plain, rtol=1e-5, atol=1e-5)
    after = tensors(model)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5, equal_nan=True)
    untouched = [cache[7:] for cache in after]
    assert all(rest.isnan().all() for rest in untouched)


def test_a_new_cache_replaces_the_old_one(model: ProgramModel) -> None:
    model.allocate_kv_cache(3)
    assert {cache.shape[0] for cache in tensors(model)} == {3}


def test_without_a_cache_nothing_runs(artifact: Artifact) -> None:
    model = EagerBackend().load(artifact)
    with pytest.raises(AssertionError, match="allocate_kv_cache was not called"):
        model.forward(build_step([request([1, 2])], BLOCK_SIZE))


def load_toy(name: str, path: Path) -> ProgramModel:
    options = CompileOptions(
        backend="eager", dtype="float32", block_size=BLOCK_SIZE, verify="capture"
    )
    model = EagerBackend().load(build(build_toy(name), path / "engine", options).artifact)
    assert isinstance(model, ProgramModel)
    return model


def test_layers_that_share_keys_and_values_share_a_cache(tmp_path: Path) -> None:
    # Four layers, of which the last two take the keys and values of the first two.
    model = load_toy("gemma3n_text", tmp_path)
    assert [step.cache for step in model.program.attention_steps] == [0, 1, 0, 1]
    assert [(group.window, group.num_layers) for group in model.kv_groups] == [(8, 1), (0, 1)]
    per_layer = 2 * (24 + 24) * BLOCK_SIZE * 4
    assert {group.bytes_per_block for group in model.kv_groups} == {per_layer}
    model.allocate_kv_cache(NUM_BLOCKS)
    held = sum(cache.nbytes for cache in tensors(model))
    assert held == NUM_BLOCKS * 2 * per_layer


@pytest.mark.parametrize(("name", "num_groups"), [("bert", 1), ("modernbert", 2)])
def test_an_encoders_requests_come_whole_and_its_layers_share_memory(
    name: str, num_groups: int, tmp_path: Path
) -> None:
    model = load_toy(name, tmp_path)
    assert model.is_encoder
    assert [group.num_layers for group in model.kv_groups] == [1] * num_groups
    model.allocate_kv_cache(NUM_BLOCKS)
    assert len(model._caches) == num_groups
    tables = [[0, 1]] * num_groups
    ids = prompt(21, 1)
    padded = build_step([StepRequest(ids, 0, tables)], BLOCK_SIZE, num_tokens=24, num_requests=3)
    assert model.forward(padded).shape == (24, 64)
    with pytest.raises(AssertionError, match="its requests come whole"):
        model.forward(build_step([StepRequest(ids[16:], 16, tables)], BLOCK_SIZE))


def test_values_are_freed_after_their_last_use() -> None:
    attention = AttentionStep(0, 0, 0, "q", "k", "v", "o", 1, 1, 8, 8, 1.0)
    program = Program(
        steps=(
            SegmentStep("first", (), ("input_ids", "position_ids"), ("q", "k", "v", "x", "unused")),
            attention,
            replace(attention, layer=1, output="o2"),
            SegmentStep("tail", (), ("o", "o2", "x"), ("hidden",)),
            SegmentStep("head", (), ("hidden", "logits_indices"), ("logits",)),
        ),
        hidden="hidden",
        logits="logits",
        dtype="float32",
        vocab_size=3,
    )
    assert last_uses(program) == [
        ("input_ids", "position_ids", "unused"),
        (),
        ("k", "q", "v"),
        ("o", "o2", "x"),
        ("hidden", "logits_indices"),
    ]


def test_pieces_give_what_the_whole_gives(model: ProgramModel) -> None:
    """Twice, with others in between, so that nothing of an earlier call may be left."""
    prompts = [prompt(6, 1), prompt(6, 2), prompt(3, 3)]
    steps = [build_step([request(ids, first=3 * i)], BLOCK_SIZE) for i, ids in enumerate(prompts)]
    expected = [model.forward(step).clone() for step in steps]
    for _ in range(2):
        for step, logits in zip(steps, expected, strict=True):
            torch.testing.assert_close(model.forward_pieces(step), logits, rtol=0, atol=0)
    indices = {index for index, _ in model._pieces}
    assert len(indices) == len(model.program.attention_steps) + 1
    assert len(model._pieces) == 2 * len(indices), "one for each number of tokens"
