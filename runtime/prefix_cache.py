"""The prefix cache: full blocks are found by a hash of all that they hold and follow.

Only full blocks are shared between requests. Sharing a part of one would save less than a block's
worth of prefill, and cost a copy and an index by tokens besides the one by hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlay.runtime.block_pool import BlockHash
from inlay.runtime.block_tables import BlockCopy, BlockTables


class PrefixCache(BlockTables):
    """Blocks that others may begin with: held ones, those that nobody holds, and the host's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As BlockTables."""
        super().__init__(*args, **kwargs)
        self._pins: dict[tuple[BlockHash, ...], list[tuple[int, int]]] = {}

    def can_hold(self, names: Sequence[BlockHash]) -> bool:
        """Whether somebody may hold the cached blocks of these names now."""
        return True

    def match(self, names: Sequence[BlockHash]) -> int:
        """How many of a sequence's first blocks, so named, every group can give."""
        found = len(names)
        good = np.ones(len(names) + 1, dtype=bool)
        for group, window in enumerate(self.windows):
            if window:
                continue
            found = next((i for i in range(found) if not self._has(group, names[i])), found)
        for group, window in enumerate(self.windows):
            if not window:
                continue
            run = 0
            for i in range(found):
                run = run + 1 if self._has(group, names[i]) else 0
                first = self._first_seen((i + 1) * self.block_size, window)
                good[i + 1] &= run >= i + 1 - first
        return int(np.flatnonzero(good[: found + 1])[-1])

    def cost(self, names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that `attach` takes from those that are free: int64 [G]."""
        cost = np.zeros(len(self.pools), dtype=np.int64)
        for group, index in self._needed(len(names)):
            block = self.pools[group].find(names[index])
            cost[group] += block is None or self.pools[group].refs(block) == 0
        return cost

    def attach(self, slot: int, names: Sequence[BlockHash], priority: int = 0) -> None:
        """Let an empty slot begin with the cached blocks of these names, which `match` found."""
        missing = []
        for group, index in self._needed(len(names)):
            block = self.pools[group].find(names[index])
            if block is None:
                missing.append((group, index))
            else:
                self.pools[group].hold(block)
                self._tables[group, slot, index] = block
        # Taken out first: what has to make room on the device must not take their places.
        places = [self.hosts[group].pop(names[index]) for group, index in missing]
        for (group, index), place in zip(missing, places, strict=True):
            block = self._take(group)
            self.copies.append(BlockCopy("onboard", group, place, block))
            self._name(group, block, names, index, priority)
            self._tables[group, slot, index] = block
        for (group, _), place in zip(missing, places, strict=True):
            self.hosts[group].give_back(place)
        for group, window in enumerate(self.windows):
            first = self._first_seen(len(names) * self.block_size, window) if window else 0
            self._begin[group, slot] = first
        self._end[slot] = len(names)

    def commit(
        self, slot: int, names: Sequence[BlockHash], begin: int, end: int, priority: int = 0
    ) -> None:
        """Blocks begin to end of a slot are full and have been run: others may use them."""
        for group, pool in enumerate(self.pools):
            for index in range(max(begin, int(self._begin[group, slot])), end):
                block = int(self._tables[group, slot, index])
                if pool.find(names[index]) is None:
                    self._name(group, block, names, index, priority)

    def pin(self, names: Sequence[BlockHash]) -> int:
        """Keep the blocks of these names until unpinned; how many of the first ones are kept.

        None where running requests may need them. Those on the host alone are not brought back.
        """
        key = tuple(names)[: self.match(names)]
        if not self.can_hold(key):
            return 0
        if key and key not in self._pins:
            pairs = [(g, self.pools[g].find(key[i])) for g, i in self._needed(len(key))]
            held = [(group, block) for group, block in pairs if block is not None]
            for group, block in held:
                self.pools[group].hold(block)
            self._pins[key] = held
        return len(key)

    def unpin(self, names: Sequence[BlockHash]) -> int:
        """Let pinned blocks go again; how many there were."""
        keys = [key for key in self._pins if key == tuple(names)[: len(key)]]
        for key in keys:
            for group, block in reversed(self._pins.pop(key)):
                self.pools[group].drop(block)
        return max(map(len, keys), default=0)

    @property
    def has_pins(self) -> bool:
        """Whether any prefix is pinned."""
        return bool(self._pins)

    def unpin_all(self) -> None:
        """Let all pinned blocks go."""
        for key in list(self._pins):
            self.unpin(key)

    def reset(self) -> None:
        """Forget every cached prefix, pinned or on the host too; running requests go on."""
        self.unpin_all()
        for pool, host in zip(self.pools, self.hosts, strict=True):
            pool.forget_all()
            host.forget_all()
        self._record("cleared")

    def discard(self, copies: Sequence[BlockCopy]) -> None:
        """These copies may not have been made: what they were to fill must not be found."""
        for copy in copies:
            if copy.kind == "offload":
                self.hosts[copy.group].forget_place(copy.target)
            elif copy.kind == "onboard":
                self.pools[copy.group].forget(copy.target)

    def _num_attached(self, names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that a slot holds after `attach`: int64 [G]."""
        held = np.zeros(len(self.pools), dtype=np.int64)
        for group, _ in self._needed(len(names)):
            held[group] += 1
        return held

    def _needed(self, count: int) -> list[tuple[int, int]]:
        """(group, index) of the blocks that a sequence of so many full blocks goes on with."""
        pairs = []
        for group, window in enumerate(self.windows):
            first = self._first_seen(count * self.block_size, window) if window else 0
            pairs += [(group, index) for index in range(first, count)]
        return pairs

    def _has(self, group: int, name: BlockHash) -> bool:
        return self.pools[group].find(name) is not None or name in self.hosts[group]

    def _name(
        self, group: int, block: int, names: Sequence[BlockHash], index: int, priority: int
    ) -> None:
        self.pools[group].name(block, names[index], priority)
        self._record("stored", group, names[index], names[index - 1] if index else b"")
