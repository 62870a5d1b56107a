from __future__ import annotations

import torch

from inlay.passes.graph import calls
from inlay.passes.insert_paged_kv import insert_paged_kv
from tests.passes.graphs import DTYPES, ROUNDING, capture_toy, export, rewrite

PAGED = torch.ops.inlay.paged_attention.default


@DTYPES
def test_groups_by_window(dtype: torch.dtype) -> None:
    gm, tensors = capture_toy("gemma2", dtype)
    count, error = rewrite(gm, tensors, insert_paged_kv)
    assert count == 3
    assert error <= ROUNDING[dtype]
    assert gm.meta["kv_groups"] == [
        {"window": 8, "chunk": 0, "layers": [0, 2]},
        {"window": 0, "chunk": 0, "layers": [1]},
    ]
    inputs = {n.meta["input"]: n for n in gm.graph.nodes if "input" in n.meta}
    assert sorted(inputs) == sorted(
        ["input_ids", "position_ids", "seq_lens", "query_start_loc"]
        + [f"{kind}.{group}" for kind in ("slot_mapping", "block_table") for group in range(2)]
        + [f"{kind}.{layer}" for kind in ("k_cache", "v_cache") for layer in range(3)]
    )
    second = calls(gm, PAGED)[1]
    names = [arg.meta["input"] for arg in second.args[3:9]]
    assert names == [
        "k_cache.1",
        "v_cache.1",
        "slot_mapping.1",
        "block_table.1",
        "seq_lens",
        "query_start_loc",
    ]
    assert second.args[9:] == (1, 24**-0.5, 0, 50.0, None, True, 0, None)
    cache = inputs["k_cache.0"].meta["val"]
    assert (cache.shape[1], cache.shape[3], cache.dtype) == (2, 24, dtype)
    tokens = inputs["input_ids"].meta["val"].shape[1]
    assert str(inputs["slot_mapping.0"].meta["val"].shape[0]) == str(tokens)


def test_the_numbers_would_show_a_wrong_group() -> None:
    gm, tensors = capture_toy("gemma2", torch.float32)
    tensors["slot_mapping.1"], tensors["slot_mapping.0"] = (
        tensors["slot_mapping.0"],
        tensors["slot_mapping.1"],
    )
    _, error = rewrite(gm, tensors, insert_paged_kv)
    assert not error < 0.01


Sees = tuple[int, int, bool]
"""Window, chunk and causality."""


class Layers(torch.nn.Module):
    """Attention after attention; each layer with keys and values of its own, or all with the
    first one's."""

    def __init__(self, layers: list[Sees], shared: bool = False) -> None:
        super().__init__()
        self.layers, self.shared = layers, shared

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        q, k, v = x[0, :, :2], x[0, :, 2:3], x[0, :, 3:4, :5]
        for index, (window, chunk, causal) in enumerate(self.layers):
            keys, values = (k, v) if self.shared else (k * (index + 1), v * (index + 1))
            out = torch.ops.inlay.attention(
                q, keys, values, where[0], index, 0.5, window, 0.0, None, causal, chunk
            )
            q = q + out.repeat(1, 1, 2)[..., :6]
        return q


def paged(layers: list[Sees], shared: bool = False) -> tuple[list[str], list[dict[str, object]]]:
    """The caches of the layers, and the groups, after the numbers were found to be the same."""
    x = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    gm, tensors = export(Layers(layers, shared), x, torch.arange(5)[None])
    for index in range(len(layers)):
        tensors[f"k_cache.{index}"] = torch.full((2, 1, 4, 6), torch.nan)
        tensors[f"v_cache.{index}"] = torch.full((2, 1, 4, 5), torch.nan)
        tensors[f"slot_mapping.{index}"] = torch.arange(5)
        tensors[f"block_table.{index}"] = torch.tensor([[0, 1]], dtype=torch.int32)
    tensors["seq_lens"] = torch.tensor([5], dtype=torch.int32)
    tensors["query_start_loc"] = torch.tensor([0, 5], dtype=torch.int32)
    count, error = rewrite(gm, tensors, insert_paged_kv)
    assert count == len(layers)
    assert error <= ROUNDING[torch.float32]
    caches = [node.args[3].meta["input"] for node in calls(gm, PAGED)]
    groups = [node.args[5].meta["input"].rpartition(".")[2] for node in calls(gm, PAGED)]
    assert len(set(groups)) == len(gm.meta["kv_groups"])
    return caches, gm.meta["kv_groups"]


FULL, WINDOW, CHUNK = (0, 0, True), (3, 0, True), (0, 2, True)
BOTH_WAYS, BAND = (0, 0, False), (2, 0, False)


def test_groups_by_all_that_a_query_sees() -> None:
    caches, groups = paged([FULL, WINDOW, CHUNK, FULL, CHUNK])
    assert caches == [f"k_cache.{index}" for index in range(5)]
    assert groups == [
        {"window": 0, "chunk": 0, "layers": [0, 3]},
        {"window": 3, "chunk": 0, "layers": [1]},
        {"window": 0, "chunk": 2, "layers": [2, 4]},
    ]


def test_layers_with_the_same_keys_and_values_share_a_cache_where_they_see_as_far() -> None:
    caches, groups = paged([FULL, WINDOW, FULL, WINDOW], shared=True)
    # Not between groups: those of a window keep fewer blocks.
    assert caches == ["k_cache.0", "k_cache.1", "k_cache.0", "k_cache.1"]
    assert [group["layers"] for group in groups] == [[0, 2], [1, 3]]


def test_an_encoders_layers_share_memory_whatever_their_keys() -> None:
    caches, groups = paged([BOTH_WAYS, BAND, BOTH_WAYS, BAND, BOTH_WAYS])
    assert caches == [f"k_cache.{index}" for index in (0, 1, 0, 1, 0)]
    assert [group["window"] for group in groups] == [0, 2]
