"""Compilations after warm-up are noticed, and sizes that differ between steps cause none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from inlay.backends.kernels.triton.compile_monitor import compilations  # noqa: E402
from inlay.backends.kernels.triton.gemm_configs import ROWS  # noqa: E402
from inlay.backends.kernels.triton.launch import Launch, Target  # noqa: E402
from inlay.backends.kernels.triton.moe import sort_kernel  # noqa: E402
from inlay.backends.kernels.triton.products import Product, plan  # noqa: E402


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for an H200 that cannot launch anything."""
    driver: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def warm_up(launch: Launch) -> None:
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    launch.kernel.warmup(**launch.args, grid=launch.grid, **options)


def sort(num_pairs: int, block: int) -> Launch:
    index = torch.empty(num_pairs, dtype=torch.int64)
    order = torch.empty(num_pairs, dtype=torch.int32)
    sizes = {"num_pairs": num_pairs, "num_experts": 6, "BLOCK": block}
    return Launch(
        sort_kernel, (6,), {"index": index, "order": order, "offsets": order} | sizes, 4, 2
    )


def test_a_compilation_is_seen_once() -> None:
    with compilations() as seen:
        warm_up(sort(32, 256))
        assert len(seen) == 1
        assert "sort_kernel" in seen[0]
        warm_up(sort(32, 256))
        assert len(seen) == 1
        warm_up(sort(32, 512))
        assert len(seen) == 2
    warm_up(sort(32, 128))
    assert len(seen) == 2


def test_numbers_of_rows_of_a_bucket_share_their_code() -> None:
    def product(rows: int) -> Launch:
        x, weight = torch.empty(rows, 512, dtype=torch.int8), torch.empty(96, 512, dtype=torch.int8)
        out, scales = torch.empty(rows, 96), (torch.empty(rows, 1), torch.empty(1, 96))
        return plan(Product(x, weight, out, scales[0], None, scales[1]), Target(90, 132))

    for pairs in (8, 16):
        warm_up(sort(pairs, 1024))
    with compilations() as seen:
        for pairs in (1, 15, 16, 17, 4096):
            warm_up(sort(pairs, 1024))
    assert not seen
    for rows in (ROWS[0], ROWS[-1] + 1):
        warm_up(product(rows))
        with compilations() as seen:
            for other in (1, 7, 16) if rows == ROWS[0] else (513, 600, 4096):
                warm_up(product(other))
        assert not seen
