from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.runtime.kv_cache import BlockPool, KVCache


def make_cache(num_blocks: int = 10, num_groups: int = 2) -> KVCache:
    return KVCache(num_groups, num_blocks, block_size=4, max_num_seqs=4, max_seq_len=30)


def test_tables_cover_their_tokens() -> None:
    cache = make_cache()
    assert cache.allocate(2, 9)
    assert cache.num_used_blocks == 3
    assert cache.table(2, 9).shape == (2, 3)
    assert cache.table(2, 8).shape == (2, 2)
    assert cache.table(2, 5).tolist() == cache.table(2, 9)[:, :2].tolist()
    with pytest.raises(AssertionError, match="slot 2 holds too few blocks"):
        cache.table(2, 13)


def test_a_table_grows_and_keeps_its_blocks() -> None:
    cache = make_cache()
    cache.allocate(0, 4)
    cache.allocate(1, 4)
    first = cache.table(0, 4).copy()
    assert cache.allocate(0, 12)
    assert cache.table(0, 12)[:, :1].tolist() == first.tolist()
    assert cache.allocate(0, 3)
    assert cache.num_used_blocks == 4
    cache.check()


def test_all_or_nothing() -> None:
    cache = make_cache(num_blocks=3)
    assert cache.allocate(0, 8)
    assert not cache.allocate(1, 8)
    assert (cache.num_used_blocks, cache.num_free_blocks) == (2, 1)
    cache.check()
    assert cache.allocate(1, 4)


def test_one_exhausted_group_is_enough_to_refuse() -> None:
    cache = make_cache(num_blocks=3)
    cache.pools[1].allocate(2)
    assert cache.num_free_blocks == 1
    assert not cache.allocate(0, 8)
    assert cache.pools[0].num_free == 3


def test_check_finds_lost_and_doubled_blocks() -> None:
    lost = make_cache()
    lost.pools[1].allocate(1)
    with pytest.raises(AssertionError, match="9 free \\+ 0 used blocks are not the 10"):
        lost.check()
    doubled = make_cache()
    doubled.allocate(0, 4)
    doubled.pools[0].free([int(doubled.table(0, 4)[0, 0])])
    with pytest.raises(AssertionError, match="10 free \\+ 1 used"):
        doubled.check()
    swapped = BlockPool(3)
    with pytest.raises(AssertionError, match="each once"):
        swapped.check([swapped.allocate(1)[0] + 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=40))
def test_free_and_used_are_all_whatever_happens(actions: list[tuple[int, int]]) -> None:
    """(slot, tokens): grow the slot to so many tokens, or free it for 0."""
    cache, held = make_cache(), [0, 0, 0, 0]
    for slot, num_tokens in actions:
        if num_tokens == 0:
            cache.free(slot)
            held[slot] = 0
        else:
            wanted = max(-(-num_tokens // 4), held[slot])
            fits = sum(held) - held[slot] + wanted <= 10
            assert cache.allocate(slot, num_tokens) == fits
            held[slot] = wanted if fits else held[slot]
        cache.check()
        assert cache.num_used_blocks == sum(held)
        assert cache.num_free_blocks == 10 - sum(held)
