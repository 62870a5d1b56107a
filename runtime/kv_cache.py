"""The paged KV cache's book-keeping: tables, prefixes, and what is promised to whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlay.runtime.block_pool import BlockHash
from inlay.runtime.prefix_cache import PrefixCache


def most_held(
    windows: Sequence[int],
    block_size: int,
    num_prompt_tokens: int,
    num_tokens: int,
    chunk: int,
    num_sequences: int,
) -> list[np.ndarray]:
    """Blocks of each KV group that each of a request's sequences may come to hold: int64 [G].

    num_tokens: of prompt and output, at most. chunk: most of them in a step; two steps may be under
    way, and what a window has passed is released after them. The prompt's full blocks, which all
    sequences share, count once; those of groups with a window do not, since they are let go at
    different times.
    """
    total, shared = -(-num_tokens // block_size), num_prompt_tokens // block_size
    reach = [-(-(window - 1 + 2 * chunk) // block_size) + 1 for window in windows]
    pairs = list(zip(windows, reach, strict=True))
    first = np.array([min(total, most) if window else total for window, most in pairs])
    other = first - np.where(np.array(windows) == 0, shared, 0)
    return [first, *[other] * (num_sequences - 1)]


class KVCache(PrefixCache):
    """Who holds which blocks, and who may come to: a promise cannot be broken."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As BlockTables."""
        super().__init__(*args, **kwargs)
        self._reserved = np.zeros_like(self._begin)  # blocks a slot may hold at most; 0: no promise

    def reserve(self, slot: int, most: np.ndarray) -> None:
        """Promise the slot that it may come to hold so many blocks of each group."""
        self._reserved[:, slot] = most

    def is_reserved(self, slot: int) -> bool:
        """Whether its blocks are promised, so that they cannot be refused."""
        return bool(self._reserved[0, slot])

    def available(self) -> np.ndarray:
        """Blocks of each group that can be taken and are promised to nobody: int64 [G]."""
        free = np.array([pool.num_free for pool in self.pools])
        promised = np.maximum(self._reserved - (self._end - self._begin), 0).sum(1)
        promised += self._forks_due()
        for group, window in enumerate(self.windows):
            if window:
                # A block that a window has passed is not free while others hold it.
                most = self._reserved[group].sum()
                promised[group] = max(most - self._num_passing(group), 0)
        return free - promised

    def taken(self, names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that are no longer available once somebody holds these: int64 [G].

        Where a window passes, one that was to be free soon is not while another holds it.
        """
        full = np.array(self.windows) == 0
        return np.where(full, self.cost(names), self._num_attached(names))

    def can_hold(self, names: Sequence[BlockHash]) -> bool:
        """Whether somebody may hold the cached blocks of these names without breaking a promise."""
        return bool((self.taken(names) <= self.available()).all())

    def needed(self, most: Sequence[np.ndarray], names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that must be available for slots to be promised so many: int64 [G].

        The first of them begins with the cached blocks of these names.
        """
        total = np.sum(most, axis=0)
        attached = self._num_attached(names)
        full = np.array(self.windows) == 0
        return total + np.where(full, self.cost(names) - attached, 0)

    def fork(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        super().fork(source, targets, num_tokens)
        for target in targets:
            self._reserved[:, target] = self._reserved[:, source]

    def free(self, slot: int) -> None:
        super().free(slot)
        self._reserved[:, slot] = 0

    def check(self) -> None:
        """Assert that no block is lost, nor held by others than those who have it."""
        slots = range(len(self._end))
        for group, pool in enumerate(self.pools):
            held = [block for slot in slots for g, block in self._held(slot) if g == group]
            pinned = [block for pairs in self._pins.values() for g, block in pairs if g == group]
            pool.check(held + pinned)
            self.hosts[group].check()
        assert (self.available() >= 0).all(), f"more is promised than there is: {self.available()}"

    def _num_passing(self, group: int) -> int:
        """Blocks that only slots with a promise hold, each counted once: free when they let go."""
        slots = np.flatnonzero(self._reserved[group])
        columns = np.arange(self._tables.shape[2])
        begin, end = self._begin[group, slots, None], self._end[slots, None]
        held = self._tables[group, slots][(columns >= begin) & (columns < end)]
        blocks, counts = np.unique(held, return_counts=True)
        refs = self.pools[group].refs
        pairs = zip(blocks.tolist(), counts.tolist(), strict=True)
        return sum(refs(block) == count for block, count in pairs)

    def _forks_due(self) -> np.ndarray:
        """Blocks of each group that reserved slots will take to write into shared blocks."""
        due = np.zeros(len(self.pools), dtype=np.int64)
        pairs = [(slot, index) for slot, index in self._shared.items() if self.is_reserved(slot)]
        if pairs:
            for group, pool in enumerate(self.pools):
                blocks = {int(self._tables[group, slot, index]) for slot, index in pairs}
                due[group] = sum(pool.refs(block) - 1 for block in blocks)
        return due
