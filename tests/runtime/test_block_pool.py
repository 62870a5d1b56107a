from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inlay.runtime.block_pool import BlockHash, BlockPool, block_hash, block_names


def name(number: int) -> BlockHash:
    return block_hash(None, [number], None)


def test_a_name_is_of_the_salt_the_parent_and_every_token() -> None:
    tokens = list(range(8))
    first, second = block_names([], tokens, 4, None)
    assert first == block_hash(None, tokens[:4], None)
    assert second == block_hash(first, tokens[4:], None)
    others = {
        *(block_hash(first, [*tokens[4 : 4 + i], 50, *tokens[5 + i :]], None) for i in range(4)),
        block_hash(first, tokens[4:7], None),
        block_hash(first, tokens[:3:-1], None),
        block_hash(None, tokens[4:], None),
        block_hash(name(0), tokens[4:], None),
        block_names([], tokens, 4, "salt")[1],
        block_names([], tokens, 4, "other salt")[1],
        block_names([], tokens, 8, None)[0],
        block_names([], [9, *tokens[1:]], 4, None)[1],
    }
    assert second not in others
    assert len(others) == 12


def test_no_salt_can_be_taken_for_a_parent() -> None:
    parents = (block_hash(None, [number], None) for number in range(100_000))
    parent = next(parent for parent in parents if max(parent) < 128)
    assert block_hash(parent, [1], None) != block_hash(None, [1], parent.decode())


def test_names_are_extended_by_full_blocks_alone() -> None:
    names = block_names([], [1, 2, 3], 4, None)
    assert names == []
    assert block_names(names, list(range(9)), 4, None) is names
    assert names == block_names([], list(range(11)), 4, None)
    assert len(names) == 2


def test_nameless_blocks_are_free_again_and_named_ones_are_cached() -> None:
    pool = BlockPool(2)
    (one, _), (two, _) = pool.take(), pool.take()
    assert (pool.num_free, pool.num_cached, pool.num_used) == (0, 0, 2)
    assert pool.name(one, name(1))
    pool.drop(one)
    pool.drop(two)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (2, 1, 0)
    assert pool.find(name(1)) == one
    assert pool.take() == (two, None), "a free block is taken before a cached one"
    assert pool.take() == (one, name(1))
    assert pool.find(name(1)) is None
    with pytest.raises(AssertionError, match="none can be taken"):
        pool.take()


def fill(pool: BlockPool, priorities: list[int]) -> list[int]:
    """A cached block of each priority, let go of in this order."""
    blocks = [pool.take()[0] for _ in priorities]
    for number, (block, priority) in enumerate(zip(blocks, priorities, strict=True)):
        pool.name(block, name(number), priority)
        pool.drop(block)
    return blocks


def test_the_one_let_go_of_first_goes_first() -> None:
    pool = BlockPool(3)
    blocks = fill(pool, [0, 0, 0])
    pool.hold(blocks[0])
    pool.drop(blocks[0])  # now it is the last
    assert [pool.take()[0] for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


def test_lower_priorities_go_first() -> None:
    pool = BlockPool(4)
    blocks = fill(pool, [7, 0, 7, 3])
    assert [pool.take()[0] for _ in range(4)] == [blocks[i] for i in (1, 3, 0, 2)]


def test_held_blocks_are_not_taken() -> None:
    pool = BlockPool(2)
    blocks = fill(pool, [0, 0])
    pool.hold(blocks[0])
    pool.hold(blocks[0])
    assert pool.take()[0] == blocks[1]
    pool.drop(blocks[0])
    assert (pool.refs(blocks[0]), pool.num_free) == (1, 0)


def test_the_first_block_of_a_name_keeps_it() -> None:
    pool = BlockPool(2)
    (one, _), (two, _) = pool.take(), pool.take()
    assert pool.name(one, name(1))
    assert not pool.name(two, name(1))
    assert pool.find(name(1)) == one
    pool.check([one, two])


def test_forgotten_blocks_are_not_found() -> None:
    pool = BlockPool(3)
    cached, held = fill(pool, [0, 5])
    pool.hold(held)
    pool.forget(cached)
    pool.forget(cached)  # it has no name any more
    assert pool.find(name(0)) is None
    assert pool.num_cached == 0
    pool.forget_all()
    assert pool.find(name(1)) is None
    pool.check([held])
    pool.drop(held)
    assert pool.num_cached == 0
    pool.check([])


def test_a_block_is_let_go_of_by_those_who_have_it() -> None:
    pool = BlockPool(1)
    block, _ = pool.take()
    pool.drop(block)
    with pytest.raises(AssertionError, match="let go of by somebody who has it not"):
        pool.drop(block)
    with pytest.raises(AssertionError, match="named and nobody holds it"):
        pool.name(block, name(0))


def test_check_finds_lost_and_doubled_blocks() -> None:
    lost = BlockPool(3)
    block, _ = lost.take()
    with pytest.raises(AssertionError, match="held by others than those who have them"):
        lost.check([])
    with pytest.raises(AssertionError, match="held by others"):
        lost.check([block, block])
    with pytest.raises(AssertionError, match="held by others"):
        lost.check([(block + 1) % 3])
    lost.check([block])
    lost._free.append(block)
    with pytest.raises(AssertionError, match="3 free, 0 cached and 1 held blocks are not the 3"):
        lost.check([block])


class PoolMachine(RuleBasedStateMachine):
    """Against a list of who holds what, and one of what is cached in the order of letting go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5)
        self.holders: list[int] = []
        self.names: dict[int, tuple[BlockHash, int]] = {}
        self.cached: list[int] = []

    @precondition(lambda self: len(set(self.holders)) < 5)
    @rule()
    def take(self) -> None:
        block, lost = self.pool.take()
        assert block not in self.holders
        if lost is None:
            assert block not in self.cached
        else:
            assert len(self.cached) + len(set(self.holders)) == 5, "a free block was left"
            assert block == min(self.cached, key=lambda one: self.names[one][1])
            self.cached.remove(block)
            assert self.names.pop(block)[0] == lost
        self.holders.append(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.holders))
        self.pool.drop(block)
        self.holders.remove(block)
        if block not in self.holders and block in self.names:
            self.cached.append(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), number=st.integers(0, 7), priority=st.integers(0, 2))
    def name(self, data: st.DataObject, number: int, priority: int) -> None:
        block = data.draw(st.sampled_from(self.holders))
        if block in self.names:
            return
        is_new = all(known != name(number) for known, _ in self.names.values())
        assert self.pool.name(block, name(number), priority) == is_new
        if is_new:
            self.names[block] = name(number), priority

    @rule(number=st.integers(0, 7))
    def find_and_hold(self, number: int) -> None:
        expected = [block for block, (known, _) in self.names.items() if known == name(number)]
        block = self.pool.find(name(number))
        assert [block] == (expected or [None])
        if block is not None:
            self.pool.hold(block)
            self.holders.append(block)
            if block in self.cached:
                self.cached.remove(block)

    @rule(block=st.integers(0, 4))
    def forget(self, block: int) -> None:
        self.pool.forget(block)
        self.names.pop(block, None)
        if block in self.cached:
            self.cached.remove(block)

    @invariant()
    def all_is_counted(self) -> None:
        self.pool.check(self.holders)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free == 5 - len(set(self.holders))


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestPool = PoolMachine.TestCase
