"""Activations' memory goes from step to step, and never while a tensor still lies in it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from inlay import CompileOptions
from inlay.backends.base import LoadedModel
from inlay.backends.step import StepInputs, StepRequest, build_step
from inlay.engine import build
from tests.toys import build_toy

BLOCK = 16
NUM_BLOCKS = 16  # of each of 4 requests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    options = CompileOptions(backend="inductor", dtype="float32", block_size=BLOCK)
    directory: Path = tmp_path_factory.mktemp("kept") / "engine"
    loaded = build(build_toy("llama"), directory, options).load_model()
    loaded.allocate_kv_cache(4 * NUM_BLOCKS)
    return loaded


def step_of(num_tokens: int, first_token: int) -> StepInputs:
    """4 requests; with 200 tokens each a layer's activations are some blocks of 200 to 700 KB."""
    tokens = [(first_token + 7 * i) % 128 for i in range(num_tokens)]
    tables = [list(range(r * NUM_BLOCKS, (r + 1) * NUM_BLOCKS)) for r in range(4)]
    requests = [StepRequest(tokens[r:] + tokens[:r], 0, [tables[r]]) for r in range(4)]
    return build_step(requests, BLOCK)


def kept() -> tuple[int, int, int]:
    """Bytes kept, bytes in use, blocks had from the C library."""
    gc.collect()
    return tuple(torch.ops.inlay_cpu.kept_memory())


def test_a_step_runs_in_the_memory_of_the_last_one(model: LoadedModel) -> None:
    used_before = kept()[1]
    expected = model.forward(step_of(200, 1)).clone()
    kept_bytes, used, fresh = kept()
    assert kept_bytes > 0
    assert used == used_before
    for _ in range(5):
        assert torch.equal(model.forward(step_of(200, 1)), expected)
    assert kept()[2] == fresh
    model.forward(step_of(120, 1))  # others' sizes
    assert torch.equal(model.forward(step_of(200, 1)), expected)


def test_what_the_caller_holds_is_not_written_over(model: LoadedModel) -> None:
    used_before = kept()[1]
    held = [model.forward_hidden(step_of(200, first))[1] for first in (1, 2, 3)]
    copies = [hidden.clone() for hidden in held]
    assert kept()[1] >= used_before + sum(hidden.nbytes for hidden in held)
    for first in (4, 5, 6):
        model.forward_hidden(step_of(200, first))
    assert not torch.equal(held[0], held[1])
    for hidden, copy in zip(held, copies, strict=True):
        assert torch.equal(hidden, copy)
    del held, hidden
    assert kept()[1] == used_before


def test_no_more_is_kept_than_the_last_steps_have_needed(model: LoadedModel) -> None:
    """Half as much again, however sizes vary, and whatever a caller held in between."""
    held = [model.forward_hidden(step_of(200, 1)) for _ in range(50)]
    del held
    for _ in range(300):  # more than are remembered
        model.forward(step_of(100, 1))
    small = kept()[0]
    for num_tokens in range(200, 100, -7):
        model.forward(step_of(num_tokens, 1))
    large = kept()[0]
    # Bytes of 4 requests, if a layer freed nothing: hidden states, feed-forward, logits.
    token = 4 * (64 * 6 + 3 * 112 * 2 + 128) * 4
    assert 0 < small <= 1.5 * 100 * token
    assert small < large <= 1.5 * 200 * token


def test_nothing_is_kept_when_a_model_is_gone(tmp_path: Path) -> None:
    options = CompileOptions(backend="inductor", dtype="float32", block_size=BLOCK)
    gone = build(build_toy("llama"), tmp_path / "engine", options).load_model()
    gone.allocate_kv_cache(4 * NUM_BLOCKS)
    gone.forward(step_of(200, 1))
    assert kept()[0] > 0
    del gone
    assert kept()[0] == 0


def test_other_tensors_are_torchs_own(model: LoadedModel) -> None:
    model.forward(step_of(200, 1))
    before = kept()
    own = [torch.empty(1 << 20) for _ in range(3)]
    assert kept() == before
    del own
    assert kept() == before
