"""The blocks of one KV group: who holds them, what they hold, which one goes first."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes
"""Names a block's content: all tokens from the request's first to the block's last, and a salt."""


def block_hash(parent: BlockHash | None, tokens: Sequence[int], salt: str | None) -> BlockHash:
    """The hash of a full block behind its parent; the chain's first link holds the salt.

    128 bits of BLAKE2b, so that a collision (somebody else's text) can be left out of account. The
    first link is hashed otherwise than the rest: no salt can be taken for a parent.
    """
    if parent is None:
        digest = blake2b((salt or "").encode(), digest_size=16, person=b"first block")
    else:
        digest = blake2b(parent, digest_size=16)
    digest.update(array("i", tokens))
    return digest.digest()


def block_names(
    names: list[BlockHash], tokens: Sequence[int], block_size: int, salt: str | None
) -> list[BlockHash]:
    """Extend the hashes of a sequence's first blocks to all of its full ones; returns the list."""
    for end in range((len(names) + 1) * block_size, len(tokens) + 1, block_size):
        parent = names[-1] if names else None
        names.append(block_hash(parent, tokens[end - block_size : end], salt))
    return names


class BlockPool:
    """Each block is free, cached (nobody holds it, its content may be asked for) or held.

    A block that holds a full, known piece of a sequence can be found by its hash, held or not.
    Cached blocks are given away when no free one is left: those of the lowest priority first,
    among them the one that was let go of first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._priorities = [0] * num_blocks
        self._block_of: dict[BlockHash, int] = {}
        self._cached: dict[int, OrderedDict[int, None]] = {}
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: the free and the cached ones."""
        return len(self._free) + self._num_cached

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, and whose content can still be found."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    def take(self) -> tuple[int, BlockHash | None]:
        """A block to write, held once, and the hash of what it held if that is lost by this."""
        assert self.num_free, "a block is wanted and none can be taken"
        if self._free:
            block = self._free.pop()
            self._refs[block] = 1
            return block, None
        lowest = min(self._cached)
        block = next(iter(self._cached[lowest]))
        lost = self._hashes[block]
        self.hold(block)
        self.forget(block)
        return block, lost

    def hold(self, block: int) -> None:
        """One more holder."""
        if self._refs[block] == 0:
            queue = self._cached[self._priorities[block]]
            del queue[block]
            if not queue:
                del self._cached[self._priorities[block]]
            self._num_cached -= 1
        self._refs[block] += 1

    def drop(self, block: int) -> None:
        """One holder less; without any the block is cached if it has a hash, else free."""
        assert self._refs[block] > 0, f"block {block} is let go of by somebody who has it not"
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if self._hashes[block] is None:
            self._free.append(block)
        else:
            self._cached.setdefault(self._priorities[block], OrderedDict())[block] = None
            self._num_cached += 1

    def refs(self, block: int) -> int:
        """How many hold it."""
        return self._refs[block]

    def find(self, name: BlockHash) -> int | None:
        """The block of this content."""
        return self._block_of.get(name)

    def name(self, block: int, name: BlockHash, priority: int = 0) -> bool:
        """Let a held block be found by its hash; False where another block has it already."""
        assert self._refs[block] > 0, f"block {block} is named and nobody holds it"
        if name in self._block_of:
            return False
        self._block_of[name] = block
        self._hashes[block] = name
        self._priorities[block] = priority
        return True

    def forget(self, block: int) -> None:
        """Nothing finds this block any more; one that nobody holds is free."""
        name = self._hashes[block]
        if name is None:
            return
        if self._refs[block] == 0:
            self.hold(block)
            self.forget(block)
            self.drop(block)
            return
        del self._block_of[name]
        self._hashes[block] = None

    def forget_all(self) -> None:
        """Nothing is found any more."""
        for block in list(self._block_of.values()):
            self.forget(block)

    def check(self, holders: Sequence[int]) -> None:
        """Assert that holders (a block once for each) is just who holds what."""
        counts = [0] * self.num_blocks
        for block in holders:
            counts[block] += 1
        assert counts == self._refs, "blocks are held by others than those who have them"
        cached = [block for queue in self._cached.values() for block in queue]
        assert len(cached) == self._num_cached, "cached blocks were miscounted"
        held = [block for block, count in enumerate(counts) if count]
        assert sorted(self._free + cached + held) == list(range(self.num_blocks)), (
            f"{len(self._free)} free, {len(cached)} cached and {len(held)} held blocks are not the"
            f" {self.num_blocks} blocks of the pool, each once"
        )
        assert all(self._hashes[block] is not None for block in cached), (
            "a cached block is nameless"
        )
        assert all(self._hashes[block] is None for block in self._free), "a free block has a name"
        assert all(self._hashes[block] == name for name, block in self._block_of.items())
        assert len(self._block_of) == sum(name is not None for name in self._hashes)
