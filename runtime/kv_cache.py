"""Which blocks of the paged KV cache belong to which request."""

from __future__ import annotations

import numpy as np


class BlockPool:
    """The blocks of one KV group: each is free, or in exactly one table."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take count blocks; the caller has looked at num_free."""
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        kept = len(self._free) - count
        taken, self._free = self._free[kept:], self._free[:kept]
        return taken[::-1]

    def free(self, blocks: list[int]) -> None:
        """Give blocks back; the last one given is the first one taken again."""
        self._free.extend(reversed(blocks))

    def check(self, used: list[int]) -> None:
        """Assert that free and used blocks together are each block exactly once."""
        everything = sorted(self._free + used)
        assert everything == list(range(self.num_blocks)), (
            f"{self.num_free} free + {len(used)} used blocks are not the {self.num_blocks} blocks"
            f" of the pool, each once: {everything[:64]}"
        )


class KVCache:
    """Block tables of all running requests, by slot, in every KV group.

    A group has its own pool and its own tables, because layers with a window will keep other
    blocks than layers that look back all the way. For now each group holds all of a request.
    """

    def __init__(
        self, num_groups: int, num_blocks: int, block_size: int, max_num_seqs: int, max_seq_len: int
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.pools = [BlockPool(num_blocks) for _ in range(num_groups)]
        width = self.num_blocks_for(max_seq_len)
        self._tables = np.zeros((num_groups, max_num_seqs, width), dtype=np.int32)
        self._num_held = np.zeros(max_num_seqs, dtype=np.int64)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens, in each group."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that every group can still give."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held, in each group."""
        return int(self._num_held.sum())

    def allocate(self, slot: int, num_tokens: int) -> bool:
        """Let the slot's tables reach num_tokens tokens; False, and no change, if it cannot be."""
        held = int(self._num_held[slot])
        missing = self.num_blocks_for(num_tokens) - held
        if missing > self.num_free_blocks:
            return False
        if missing > 0:
            for table, pool in zip(self._tables[:, slot], self.pools, strict=True):
                table[held : held + missing] = pool.allocate(missing)
            self._num_held[slot] = held + missing
        return True

    def table(self, slot: int, num_tokens: int) -> np.ndarray:
        """The blocks of the slot's first num_tokens tokens: int32 [G, blocks], a view."""
        needed = self.num_blocks_for(num_tokens)
        assert needed <= self._num_held[slot], f"slot {slot} holds too few blocks"
        return self._tables[:, slot, :needed]

    def free(self, slot: int) -> None:
        """Give back all blocks of a slot."""
        held = int(self._num_held[slot])
        for table, pool in zip(self._tables[:, slot], self.pools, strict=True):
            pool.free(table[:held].tolist())
        self._num_held[slot] = 0

    def check(self) -> None:
        """Assert that no block is lost, held twice, or both held and free."""
        for tables, pool in zip(self._tables, self.pools, strict=True):
            held = zip(tables, self._num_held, strict=True)
            pool.check([int(block) for table, count in held for block in table[:count]])
