"""For the tests that run kernels in Triton's interpreter, each file in a process of its own: the
interpreter is chosen when Triton is imported, for all of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

assert os.environ.get("TRITON_INTERPRET") == "1", "to be run by test_triton_interpreted.py"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def between_nan(x: torch.Tensor) -> torch.Tensor:
    """The same rows with NaN (or the largest number) after each of them."""
    worst = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.cat((x, torch.full_like(x, worst)), -1)
    return wide[..., : x.shape[-1]]
