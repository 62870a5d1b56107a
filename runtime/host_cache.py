"""The prefix cache's second tier: blocks that the device gave up, kept in host memory."""

from __future__ import annotations

from collections import OrderedDict

from inlay.runtime.block_pool import BlockHash


class HostCache:
    """Which place of the host's memory holds which block of one KV group; oldest out first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._places: OrderedDict[BlockHash, int] = OrderedDict()
        self._free = list(range(num_blocks - 1, -1, -1))

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def put(self, name: BlockHash) -> tuple[int | None, BlockHash | None]:
        """A place for this block (None: no room), and the hash of what had to go for it."""
        lost = None
        if name not in self._places:
            if not self._free and self._places:
                lost, place = self._places.popitem(last=False)
                self._free.append(place)
            if not self._free:
                return None, None
            self._places[name] = self._free.pop()
        self._places.move_to_end(name)
        return self._places[name], lost

    def pop(self, name: BlockHash) -> int:
        """Take a block out to read it; its place is nobody's until it is given back."""
        return self._places.pop(name)

    def give_back(self, place: int) -> None:
        """What was taken out has been read."""
        self._free.append(place)

    def forget_place(self, place: int) -> None:
        """What lies there is not what it should be."""
        for name, taken in self._places.items():
            if taken == place:
                del self._places[name]
                self._free.append(place)
                return

    def forget_all(self) -> None:
        """Nothing is kept any more."""
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._places.clear()

    def check(self) -> None:
        """Assert that every place is free or one block's."""
        assert sorted([*self._free, *self._places.values()]) == list(range(self.num_blocks))
