"""Block tables: which blocks each running sequence holds, and the copies that are due.

Every KV group has a pool and tables of its own, because layers with a window keep other blocks
than layers that look back all the way. Nothing here touches a tensor: what has to be copied on the
device is listed in `copies`, in order, for the step that needs it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from inlay.runtime.block_pool import BlockHash, BlockPool
from inlay.runtime.host_cache import HostCache

MAX_EVENTS = 100_000
"""KV events that are kept until somebody asks for them; older ones are lost."""


@dataclass(frozen=True)
class BlockCopy:
    """A block's tensors to be copied before the step runs: from source to target.

    "fork": a shared block that is about to be written. "offload": to the host, before its block is
    written anew. "onboard": back from there.
    """

    kind: Literal["fork", "offload", "onboard"]
    group: int
    source: int
    target: int


class BlockTables:
    """A slot is a running sequence's place; its blocks [begin, end) are held, of each KV group."""

    def __init__(
        self,
        num_blocks: Sequence[int],
        windows: Sequence[int],
        block_size: int,
        max_num_seqs: int,
        max_seq_len: int,
        *,
        num_host_blocks: Sequence[int] | None = None,
        events: bool = False,
    ) -> None:
        """num_blocks, windows, num_host_blocks: for each KV group; a window of 0 is none."""
        self.block_size = block_size
        self.windows = tuple(windows)
        self.pools = [BlockPool(count) for count in num_blocks]
        self.hosts = [HostCache(count) for count in num_host_blocks or [0] * len(num_blocks)]
        self.copies: list[BlockCopy] = []
        self._events: deque[dict[str, Any]] | None = deque(maxlen=MAX_EVENTS) if events else None
        shape = (len(self.pools), max_num_seqs)
        self._tables = np.zeros((*shape, self.num_blocks_for(max_seq_len)), dtype=np.int32)
        self._begin = np.zeros(shape, dtype=np.int64)  # blocks before it were released
        self._end = np.zeros(max_num_seqs, dtype=np.int64)
        self._shared: dict[int, int] = {}  # slot -> its partial block, which others may hold too

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that somebody holds, of all groups."""
        return sum(pool.num_used for pool in self.pools)

    def wanted(self, slot: int, end: int) -> np.ndarray:
        """Blocks of each group that are missing for the slot's first `end` tokens: int64 [G]."""
        growth = max(self.num_blocks_for(end) - int(self._end[slot]), 0)
        wanted = np.full(len(self.pools), growth)
        if slot in self._shared:
            wanted += [block is not None for block in self._blocks_to_fork(slot)]
        return wanted

    def holds(self, slot: int, end: int) -> bool:
        """Whether the slot's first `end` tokens have blocks that are its own to write."""
        return slot not in self._shared and end <= int(self._end[slot]) * self.block_size

    def allocate(self, slot: int, end: int) -> None:
        """Let the slot's tables reach `end` tokens, its next tokens' blocks its own.

        The caller has looked at `available`, or reserved.
        """
        if self.holds(slot, end):
            return
        if slot in self._shared:
            for group, block in enumerate(self._blocks_to_fork(slot)):
                if block is not None:
                    self._fork_block(group, slot, block)
            del self._shared[slot]
        held, needed = int(self._end[slot]), self.num_blocks_for(end)
        if needed > held:
            for group in range(len(self.pools)):
                taken = [self._take(group) for _ in range(needed - held)]
                self._tables[group, slot, held:needed] = taken
            self._end[slot] = needed

    def fork(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Let other slots hold what source holds, up to its num_tokens tokens.

        Whoever writes first into a block that is then shared gets a copy of it.
        """
        for target in targets:
            assert self._end[target] == 0, f"slot {target} holds blocks"
            self._tables[:, target] = self._tables[:, source]
            self._begin[:, target], self._end[target] = self._begin[:, source], self._end[source]
            for group, block in self._held(target):
                self.pools[group].hold(block)
        self._mark_shared([source, *targets], num_tokens)

    def reorder(self, slots: Sequence[int], parents: Sequence[int], num_tokens: int) -> None:
        """Let slots[i] hold what slots[parents[i]] held: beams, after a choice."""
        before = [pair for slot in slots for pair in self._held(slot)]
        sources = [slots[parent] for parent in parents]
        self._tables[:, slots] = self._tables[:, sources]
        self._begin[:, slots], self._end[slots] = self._begin[:, sources], self._end[sources]
        for slot in slots:
            for group, block in self._held(slot):
                self.pools[group].hold(block)
        for group, block in before:
            self.pools[group].drop(block)
        self._mark_shared(slots, num_tokens)

    def release(self, slot: int, num_tokens: int) -> None:
        """Let go of blocks that no later token's window reaches; num_tokens have been run."""
        for group, window in enumerate(self.windows):
            if not window or num_tokens < window:
                continue
            begin, held = self._first_seen(num_tokens, window), int(self._begin[group, slot])
            if begin > held:
                begin = min(begin, int(self._end[slot]))
                for block in self._tables[group, slot, held:begin].tolist():
                    self.pools[group].drop(block)
                self._tables[group, slot, held:begin] = 0
                self._begin[group, slot] = begin

    def free(self, slot: int) -> None:
        """Let go of all that a slot holds; the end of a sequence is given away before its start."""
        for group, block in reversed(self._held(slot)):
            self.pools[group].drop(block)
        self._tables[:, slot] = 0
        self._begin[:, slot], self._end[slot] = 0, 0
        self._shared.pop(slot, None)

    def table(self, slot: int, num_tokens: int) -> np.ndarray:
        """The blocks of one slot's first num_tokens tokens: int32 [G, blocks]."""
        return self.tables(np.array([slot]), np.array([num_tokens]))[:, 0]

    def tables(self, slots: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """The blocks of the slots' first num_tokens tokens: int32 [G, slots, blocks].

        0 stands where a window has passed; nobody reads those, nor what is behind a slot's tokens.
        """
        needed = -(-num_tokens // self.block_size)
        short = slots[needed > self._end[slots]]
        assert not len(short), f"slot {short[0]} holds too few blocks"
        return self._tables[:, slots, : int(needed.max())]

    def take_copies(self) -> list[BlockCopy]:
        """What has to be copied before the step that was just scheduled."""
        copies, self.copies = self.copies, []
        return copies

    def take_events(self) -> list[dict[str, Any]]:
        """KV events since the last call, oldest first; [] where they are off."""
        events = list(self._events or ())
        if self._events is not None:
            self._events.clear()
        return events

    def _first_seen(self, num_tokens: int, window: int) -> int:
        """The first block that the token at this position looks back on."""
        return max(num_tokens - window + 1, 0) // self.block_size

    def _held(self, slot: int) -> list[tuple[int, int]]:
        end = int(self._end[slot])
        return [
            (group, block)
            for group, begin in enumerate(self._begin[:, slot].tolist())
            for block in self._tables[group, slot, begin:end].tolist()
        ]

    def _take(self, group: int) -> int:
        block, lost = self.pools[group].take()
        if lost is not None:
            if self.hosts[group].num_blocks:
                place, gone = self.hosts[group].put(lost)
                if place is not None:
                    self.copies.append(BlockCopy("offload", group, block, place))
                    self._record("offloaded", group, lost)
                    lost = gone
            if lost is not None and self.pools[group].find(lost) is None:
                self._record("removed", group, lost)
        return block

    def _record(
        self, kind: str, group: int = 0, name: BlockHash = b"", parent: BlockHash = b""
    ) -> None:
        if self._events is not None:
            event = {"kind": kind, "group": group, "block_hash": name.hex()}
            self._events.append({**event, "parent_block_hash": parent.hex()} if parent else event)

    def _mark_shared(self, slots: Sequence[int], num_tokens: int) -> None:
        for slot in slots:
            self._shared.pop(slot, None)
            if num_tokens % self.block_size:
                self._shared[slot] = num_tokens // self.block_size

    def _blocks_to_fork(self, slot: int) -> list[int | None]:
        """For each group the partial block, where others hold it too."""
        blocks = self._tables[:, slot, self._shared[slot]].tolist()
        return [b if p.refs(b) > 1 else None for b, p in zip(blocks, self.pools, strict=True)]

    def _fork_block(self, group: int, slot: int, block: int) -> None:
        own = self._take(group)
        self.copies.append(BlockCopy("fork", group, block, own))
        self.pools[group].drop(block)
        self._tables[group, slot, self._shared[slot]] = own
