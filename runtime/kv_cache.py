"""The paged KV cache's book-keeping: block tables by slot, prefix reuse, copies that are due.

Every KV group has a pool and tables of its own, because layers with a window keep other blocks
than layers that look back all the way. Nothing here touches a tensor: what has to be copied on the
device is listed in `copies`, in order, for the step that needs it.

Only full blocks are shared between requests. Sharing a part of one would save less than a block's
worth of prefill, and cost a copy and an index by tokens besides the one by hashes.
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


class KVCache:
    """Who holds which blocks. A slot is a running sequence's place."""

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
        self._reserved = np.zeros(shape, dtype=np.int64)  # blocks a slot may hold at most; 0: none
        self._shared: dict[int, int] = {}  # slot -> its partial block, which others may hold too
        self._pins: dict[tuple[BlockHash, ...], list[tuple[int, int]]] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that somebody holds, of all groups."""
        return sum(pool.num_used for pool in self.pools)

    # What a request needs, and whether it can be had.

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

    def needed(self, most: Sequence[np.ndarray], names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that must be available for slots to be promised so many: int64 [G].

        The first of them begins with the cached blocks of these names.
        """
        total = np.sum(most, axis=0)
        attached = self._num_attached(names)
        full = np.array(self.windows) == 0
        return total + np.where(full, self.cost(names) - attached, 0)

    def wanted(self, slot: int, end: int) -> np.ndarray:
        """Blocks of each group that are missing for the slot's first `end` tokens: int64 [G]."""
        growth = max(self.num_blocks_for(end) - int(self._end[slot]), 0)
        wanted = np.full(len(self.pools), growth)
        if slot in self._shared:
            wanted += [block is not None for block in self._blocks_to_fork(slot)]
        return wanted

    # Taking, sharing and letting go.

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
            self._reserved[:, target] = self._reserved[:, source]
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
        self._begin[:, slot], self._end[slot], self._reserved[:, slot] = 0, 0, 0
        self._shared.pop(slot, None)

    def tables(self, slots: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """The blocks of the slots' first num_tokens tokens: int32 [G, slots, blocks].

        0 stands where a window has passed; nobody reads those, nor what is behind a slot's tokens.
        """
        needed = -(-num_tokens // self.block_size)
        short = slots[needed > self._end[slots]]
        assert not len(short), f"slot {short[0]} holds too few blocks"
        return self._tables[:, slots, : int(needed.max())]

    def table(self, slot: int, num_tokens: int) -> np.ndarray:
        """The blocks of one slot's first num_tokens tokens: int32 [G, blocks]."""
        return self.tables(np.array([slot]), np.array([num_tokens]))[:, 0]

    # The prefix cache.

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

    def _num_attached(self, names: Sequence[BlockHash]) -> np.ndarray:
        """Blocks of each group that a slot holds after `attach`: int64 [G]."""
        held = np.zeros(len(self.pools), dtype=np.int64)
        for group, _ in self._needed(len(names)):
            held[group] += 1
        return held

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
        if (self.taken(key) > self.available()).any():
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

    def take_copies(self) -> list[BlockCopy]:
        """What has to be copied before the step that was just scheduled."""
        copies, self.copies = self.copies, []
        return copies

    def discard(self, copies: Sequence[BlockCopy]) -> None:
        """These copies may not have been made: what they were to fill must not be found."""
        for copy in copies:
            if copy.kind == "offload":
                self.hosts[copy.group].forget_place(copy.target)
            elif copy.kind == "onboard":
                self.pools[copy.group].forget(copy.target)

    def take_events(self) -> list[dict[str, Any]]:
        """KV events since the last call, oldest first; [] where they are off."""
        events = list(self._events or ())
        if self._events is not None:
            self._events.clear()
        return events

    def check(self) -> None:
        """Assert that no block is lost, nor held by others than those who have it."""
        slots = range(len(self._end))
        for group, pool in enumerate(self.pools):
            held = [block for slot in slots for g, block in self._held(slot) if g == group]
            pinned = [block for pairs in self._pins.values() for g, block in pairs if g == group]
            pool.check(held + pinned)
            self.hosts[group].check()
        assert (self.available() >= 0).all(), f"more is promised than there is: {self.available()}"

    # Helpers.

    def _first_seen(self, num_tokens: int, window: int) -> int:
        """The first block that the token at this position looks back on."""
        return max(num_tokens - window + 1, 0) // self.block_size

    def _needed(self, count: int) -> list[tuple[int, int]]:
        """(group, index) of the blocks that a sequence of so many full blocks goes on with."""
        pairs = []
        for group, window in enumerate(self.windows):
            first = self._first_seen(count * self.block_size, window) if window else 0
            pairs += [(group, index) for index in range(first, count)]
        return pairs

    def _has(self, group: int, name: BlockHash) -> bool:
        return self.pools[group].find(name) is not None or name in self.hosts[group]

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
            if lost is not None:
                self._record("removed", group, lost)
        return block

    def _name(
        self, group: int, block: int, names: Sequence[BlockHash], index: int, priority: int
    ) -> None:
        self.pools[group].name(block, names[index], priority)
        self._record("stored", group, names[index], names[index - 1] if index else b"")

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
