from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from inlay.runtime.block_pool import block_names
from inlay.runtime.block_tables import BlockCopy
from inlay.runtime.kv_cache import KVCache, most_held

WINDOW = 6


def make_cache(*sizes: int, **options: Any) -> KVCache:
    """Blocks of 4 tokens; the first group sees everything, the second one a window."""
    sizes = sizes or (10, 10)
    windows = (0, WINDOW)[: len(sizes)]
    return KVCache(sizes, windows, block_size=4, max_num_seqs=4, max_seq_len=40, **options)


def names_of(*tokens: int) -> list[bytes]:
    return block_names([], tokens, 4, None)


def run(cache: KVCache, slot: int, tokens: list[int]) -> np.ndarray:
    """A sequence that was run in this slot: its table, before a window passed anything."""
    cache.allocate(slot, len(tokens))
    table = cache.table(slot, len(tokens)).copy()
    cache.commit(slot, names_of(*tokens), 0, len(tokens) // 4)
    cache.release(slot, len(tokens))
    return table


def test_tables_cover_their_tokens() -> None:
    cache = make_cache()
    cache.allocate(2, 9)
    assert cache.num_used_blocks == 6
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
    assert not cache.holds(0, 12)
    cache.allocate(0, 12)
    assert cache.holds(0, 12)
    assert cache.table(0, 12)[:, :1].tolist() == first.tolist()
    cache.allocate(0, 3)
    assert cache.num_used_blocks == 2 * 4
    cache.check()


def test_one_exhausted_group_is_enough_to_refuse() -> None:
    cache = make_cache(10, 2)
    assert (cache.wanted(0, 12) > cache.available()).tolist() == [False, True]
    cache.allocate(0, 8)
    assert cache.available().tolist() == [8, 0]
    assert cache.wanted(0, 8).tolist() == [0, 0]


def test_promised_blocks_are_not_available_to_others() -> None:
    cache = make_cache(10)
    cache.reserve(0, np.array([7]))
    assert cache.is_reserved(0)
    assert cache.available().tolist() == [3]
    cache.allocate(0, 8)
    assert cache.available().tolist() == [3], "two of the seven are held now"
    cache.free(0)
    assert cache.available().tolist() == [10]
    assert not cache.is_reserved(0)


def test_a_window_lets_go_of_what_it_has_passed() -> None:
    cache = make_cache()
    cache.allocate(0, 20)
    before = cache.table(0, 20).copy()
    cache.release(0, 9)  # the token at 9 looks back to 4
    assert [pool.num_used for pool in cache.pools] == [5, 4]
    cache.release(0, 8)
    assert [pool.num_used for pool in cache.pools] == [5, 4]
    after = cache.table(0, 20)
    assert after[0].tolist() == before[0].tolist()
    assert after[1].tolist() == [0, *before[1, 1:]]
    cache.check()
    cache.free(0)
    assert cache.num_used_blocks == 0


def test_the_most_that_is_ever_held() -> None:
    """By two steps under way of as many tokens as a step may have, wherever they start."""
    for window, chunk, total in [(6, 3, 40), (1, 1, 40), (9, 8, 40), (30, 8, 40), (6, 8, 11)]:
        (most,) = most_held([window], 4, 5, total, chunk, 1)
        for start in range(total):
            cache = KVCache([100], [window], 4, 1, 64)
            held, known = 0, start
            for end in range(start, total + 1, chunk):
                cache.allocate(0, min(end + 2 * chunk, total))
                cache.release(0, end)
                cache.allocate(0, min(end + 2 * chunk, total))
                held, known = max(held, cache.num_used_blocks if end > known else 0), end
            assert held <= most[0]
    assert [each.tolist() for each in most_held([0, 6], 4, 9, 21, 2, 3)] == [[6, 4], [4, 4], [4, 4]]


def test_a_prefix_is_found_as_far_as_every_group_has_it() -> None:
    cache = make_cache()
    tokens = list(range(16))
    names = names_of(*tokens)
    run(cache, 0, tokens)
    cache.free(0)
    assert cache.match(names) == 4
    assert cache.match(names_of(*tokens[:8], 99, *tokens[9:])) == 2
    assert cache.match(names_of(99, *tokens[1:])) == 0
    assert cache.match(block_names([], tokens, 4, "salt")) == 0
    block = cache.pools[0].find(names[2])
    assert block is not None
    cache.pools[0].forget(block)
    assert cache.match(names) == 2
    cache.check()


def test_a_window_needs_its_own_blocks_alone() -> None:
    """Behind 16 tokens it looks back to 11: the blocks before are not asked for."""
    cache = make_cache()
    tokens = list(range(16))
    names = names_of(*tokens)
    table = run(cache, 0, tokens)
    cache.free(0)
    for index in range(2):
        cache.pools[1].forget(int(table[1, index]))
    assert cache.match(names) == 4
    assert cache.match(names[:3]) == 0
    assert cache.cost(names).tolist() == [4, 2]
    cache.attach(1, names)
    assert [pool.num_used for pool in cache.pools] == [4, 2]
    assert cache.table(1, 16)[0].tolist() == table[0].tolist()
    assert cache.table(1, 16)[1].tolist() == [0, 0, *table[1, 2:]]
    cache.pools[1].forget(int(table[1, 3]))
    assert cache.match(names) == 0
    cache.check()


def test_what_others_hold_costs_nothing() -> None:
    cache = make_cache()
    tokens = list(range(12))
    run(cache, 0, tokens)
    names = names_of(*tokens)
    assert cache.cost(names).tolist() == [0, 0]
    cache.attach(1, names)
    assert cache.num_used_blocks == 3 + 2
    cache.free(0)
    cache.check()
    assert cache.cost(names).tolist() == [0, 0]
    cache.free(1)
    assert cache.cost(names).tolist() == [3, 2]


def test_shared_windows_are_promised_in_full() -> None:
    """Blocks that two sequences share are held by each when the other has let them go: what both
    may need of their own must not be given away meanwhile."""
    cache = make_cache(40, 8)
    tokens = list(range(8))
    run(cache, 0, tokens)
    cache.free(0)
    names, most = names_of(*tokens), np.array([10, 4])
    for slot in (1, 2):
        assert (cache.needed([most], names) <= cache.available()).all()
        cache.attach(slot, names)
        cache.reserve(slot, most)
    assert cache.available()[1] == 0
    assert not (cache.needed([most], names) <= cache.available()).all()
    for end in range(9, 41):
        for slot in (1, 2):
            cache.allocate(slot, end)
            cache.release(slot, end)
            cache.check()


def test_the_prefix_goes_after_its_continuation() -> None:
    """Blocks are taken from the end of a sequence that was let go of."""
    cache = make_cache(4)
    tokens = list(range(16))
    run(cache, 0, tokens)
    cache.free(0)
    cache.allocate(1, 8)
    assert cache.match(names_of(*tokens)) == 2


def test_whoever_writes_into_a_shared_block_gets_a_copy() -> None:
    cache = make_cache(10)
    cache.allocate(0, 6)
    cache.fork(0, [1, 2], 6)
    whole, half = cache.table(0, 6)[0].tolist()
    assert cache.num_used_blocks == 2
    assert [cache.wanted(slot, 7).tolist() for slot in range(3)] == [[1]] * 3
    assert not cache.holds(0, 6)
    cache.allocate(0, 7)
    cache.allocate(1, 7)
    assert cache.wanted(2, 7).tolist() == [0], "it is the last that holds it"
    cache.allocate(2, 7)
    tables = [cache.table(slot, 7)[0].tolist() for slot in range(3)]
    assert [table[0] for table in tables] == [whole] * 3
    assert tables[2][1] == half
    assert len({table[1] for table in tables}) == 3
    own = [BlockCopy("fork", 0, half, table[1]) for table in tables[:2]]
    assert cache.take_copies() == own
    assert cache.take_copies() == []
    cache.check()


def test_full_blocks_are_shared_without_a_copy() -> None:
    cache = make_cache()
    cache.allocate(0, 8)
    cache.fork(0, [1], 8)
    cache.allocate(0, 9)
    cache.allocate(1, 9)
    assert cache.take_copies() == []
    assert [pool.num_used for pool in cache.pools] == [4, 4]
    cache.check()


@pytest.mark.parametrize("num_prompt_tokens", [8, 9, 11])
def test_forks_never_want_more_than_was_promised(num_prompt_tokens: int) -> None:
    cache = make_cache(14, 100)
    most = most_held(cache.windows, 4, num_prompt_tokens, 20, 4, 4)
    for slot in range(4):
        cache.reserve(slot, most[slot])
    cache.allocate(0, num_prompt_tokens)
    cache.check()
    cache.fork(0, [1, 2, 3], num_prompt_tokens)
    cache.check()
    for end in range(num_prompt_tokens + 1, 21):
        for slot in range(4):
            cache.allocate(slot, end)
            cache.release(slot, end)
            cache.check()
    assert cache.available()[0] == 14 - sum(each[0] for each in most)


def test_beams_take_over_each_others_blocks() -> None:
    cache = make_cache(20)
    cache.allocate(0, 6)
    cache.fork(0, [1, 2], 6)
    for slot in range(3):
        cache.allocate(slot, 7)
    tables = [cache.table(slot, 7)[0].tolist() for slot in range(3)]
    cache.take_copies()
    cache.reorder([0, 1, 2], [2, 2, 0], 7)
    moved = [cache.table(slot, 7)[0].tolist() for slot in range(3)]
    assert moved == [tables[2], tables[2], tables[0]]
    cache.check()
    for slot in range(3):
        cache.allocate(slot, 8)
    (copy,) = cache.take_copies()
    assert copy.source == tables[2][1]
    assert cache.num_used_blocks == 1 + 3
    cache.check()


def test_pinned_blocks_stay() -> None:
    cache = make_cache(6)
    tokens = list(range(10))
    names = names_of(*tokens)
    assert cache.pin(names) == 0
    run(cache, 0, tokens)
    cache.free(0)
    assert cache.pin(names) == 2
    assert cache.pin(names) == 2, "twice is once"
    assert cache.has_pins
    assert cache.available().tolist() == [4]
    cache.allocate(1, 16)
    cache.check()
    assert cache.match(names) == 2
    cache.free(1)
    assert cache.unpin(names) == 2
    assert cache.unpin(names) == 0
    cache.allocate(1, 24)
    assert cache.match(names) == 0


def test_nothing_is_pinned_that_was_promised() -> None:
    cache = make_cache(6)
    run(cache, 0, list(range(8)))
    cache.free(0)
    cache.reserve(1, np.array([5]))
    assert cache.pin(names_of(*range(8))) == 0
    assert not cache.has_pins
    cache.check()


def test_reset_forgets_and_running_ones_go_on() -> None:
    cache = make_cache(6, num_host_blocks=[2], events=True)
    run(cache, 0, list(range(8)))
    table = cache.table(0, 8).tolist()
    cache.pin(names_of(*range(8)))
    cache.reset()
    assert cache.match(names_of(*range(8))) == 0
    assert not cache.has_pins
    assert cache.table(0, 8).tolist() == table
    cache.check()
    cache.free(0)
    assert (cache.pools[0].num_cached, cache.num_used_blocks) == (0, 0)
    assert cache.take_events()[-1]["kind"] == "cleared"


def test_the_host_keeps_what_the_device_gives_up() -> None:
    cache = make_cache(3, num_host_blocks=[2], events=True)
    tokens = list(range(12))
    names = names_of(*tokens)
    first = run(cache, 0, tokens)[0].tolist()
    cache.free(0)
    cache.allocate(1, 8)  # gives up the last two
    copies = cache.take_copies()
    assert [(copy.kind, copy.source) for copy in copies] == [
        ("offload", first[2]),
        ("offload", first[1]),
    ]
    assert cache.match(names) == 3
    cache.free(1)
    assert cache.cost(names).tolist() == [3]
    cache.attach(0, names)
    back = cache.take_copies()
    assert [copy.kind for copy in back] == ["onboard", "onboard"]
    places = {name: copy.target for name, copy in zip((names[2], names[1]), copies, strict=True)}
    table = cache.table(0, 12)[0].tolist()
    assert [(copy.source, copy.target) for copy in back] == [
        (places[names[1]], table[1]),
        (places[names[2]], table[2]),
    ]
    assert len(cache.hosts[0]) == 0
    cache.check()
    kinds = [event["kind"] for event in cache.take_events()]
    assert kinds == ["stored"] * 3 + ["offloaded"] * 2 + ["stored"] * 2
    assert cache.take_events() == []


def test_copies_that_may_not_have_been_made_are_not_relied_upon() -> None:
    cache = make_cache(3, num_host_blocks=[2])
    tokens = list(range(12))
    names = names_of(*tokens)
    run(cache, 0, tokens)
    cache.free(0)
    cache.allocate(1, 8)
    cache.discard(cache.take_copies())
    assert cache.match(names) == 1
    cache.check()
    cache = make_cache(3, num_host_blocks=[2])
    run(cache, 0, tokens)
    cache.free(0)
    cache.allocate(1, 8)
    cache.take_copies()
    cache.free(1)
    cache.attach(0, names)
    cache.discard(cache.take_copies())
    cache.free(0)
    assert cache.match(names) == 1
    cache.check()


def test_events_name_blocks_and_their_parents() -> None:
    cache = make_cache(2, events=True)
    names = names_of(*range(8))
    run(cache, 0, list(range(8)))
    cache.free(0)
    cache.allocate(0, 8)
    stored = {"kind": "stored", "group": 0}
    one, two = (name.hex() for name in names)
    assert cache.take_events() == [
        {**stored, "block_hash": one},
        {**stored, "block_hash": two, "parent_block_hash": one},
        {"kind": "removed", "group": 0, "block_hash": two},
        {"kind": "removed", "group": 0, "block_hash": one},
    ]
    silent = make_cache(2)
    run(silent, 0, list(range(8)))
    assert silent.take_events() == []


def test_check_finds_lost_and_doubled_blocks() -> None:
    lost = make_cache()
    lost.pools[1].take()
    with pytest.raises(AssertionError, match="held by others than those who have them"):
        lost.check()
    doubled = make_cache()
    doubled.allocate(0, 4)
    doubled.pools[0].drop(int(doubled.table(0, 4)[0, 0]))
    with pytest.raises(AssertionError, match="held by others than those who have them"):
        doubled.check()
    promised = make_cache()
    promised.reserve(0, np.array([11, 1]))
    with pytest.raises(AssertionError, match="more is promised than there is"):
        promised.check()


class Device:
    """What lies in the blocks: a token's place there is (block, offset)."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.blocks: dict[tuple[str, int, int], list[Any]] = {}

    def _at(self, tier: str, group: int, block: int) -> list[Any]:
        return self.blocks.setdefault((tier, group, block), [None] * 4)

    def copy(self) -> None:
        for one in self.cache.take_copies():
            source = self._at("host" if one.kind == "onboard" else "device", one.group, one.source)
            tier = "host" if one.kind == "offload" else "device"
            self.blocks[tier, one.group, one.target] = list(source)

    def write(self, slot: int, tokens: list[int], start: int) -> None:
        """And read back what each group sees from the last of them."""
        table = self.cache.table(slot, len(tokens))
        for group, window in enumerate(self.cache.windows):
            for at in range(start, len(tokens)):
                self._at("device", group, int(table[group, at // 4]))[at % 4] = tuple(
                    tokens[: at + 1]
                )
            first = max(len(tokens) - window, 0) if window else 0
            for at in range(first, len(tokens)):
                seen = self._at("device", group, int(table[group, at // 4]))[at % 4]
                assert seen == tuple(tokens[: at + 1]), f"slot {slot}, group {group}, token {at}"


@pytest.mark.parametrize("seed", range(12))
def test_every_sequence_reads_what_it_wrote(seed: int) -> None:
    """Random prefixes, forks, beams, pins and resets, under promises, with a host tier or not."""
    rng = random.Random(seed)
    hosts = [None, [3, 2], [6, 6]][seed % 3]
    cache = make_cache(rng.randint(16, 26), rng.randint(18, 28), num_host_blocks=hosts)
    device, running = Device(cache), dict[int, list[int]]()
    prefixes = [[rng.randrange(9) for _ in range(20)] for _ in range(3)]
    committed, ends, family_of = dict[int, int](), dict[int, int](), dict[int, object]()
    counts = dict[str, int]()

    def begin() -> None:
        tokens = [*rng.choice(prefixes)[: rng.randint(2, 20)], rng.randrange(9)]
        names = names_of(*tokens)[: (len(tokens) - 1) // 4]
        names = names[: cache.match(names)]
        family = rng.choice([1, 1, 2, 3])
        free = [slot for slot in range(4) if slot not in running]
        end = len(tokens) + rng.randint(1, 12)
        most = most_held(cache.windows, 4, len(tokens), end, len(tokens), family)
        if len(free) < family or (cache.needed(most, names) > cache.available()).any():
            return
        leader, *others = free[:family]
        counts["hits"] = counts.get("hits", 0) + bool(names)
        cache.attach(leader, names, rng.choice([0, 0, 5]))
        for slot, each in zip(free, most, strict=False):
            cache.reserve(slot, each)
        cache.allocate(leader, len(tokens))
        device.copy()
        device.write(leader, tokens, 4 * len(names))
        cache.fork(leader, others, len(tokens))
        for slot in (leader, *others):
            running[slot], committed[slot], ends[slot] = list(tokens), len(names), end
            family_of[slot] = tokens
        counts["forks"] = counts.get("forks", 0) + bool(others)

    def grow() -> None:
        growing = [slot for slot, tokens in running.items() if len(tokens) < ends[slot]]
        for slot in growing:
            running[slot].append(rng.randrange(9))
            cache.allocate(slot, len(running[slot]))
        device.copy()
        for slot in growing:
            device.write(slot, running[slot], len(running[slot]) - 1)

    def commit() -> None:
        for slot, tokens in running.items():
            full = len(tokens) // 4
            cache.commit(slot, names_of(*tokens), committed[slot], full)
            committed[slot] = max(committed[slot], full)
            cache.release(slot, len(tokens))

    def end() -> None:
        if running:
            slot = rng.choice(list(running))
            del running[slot]
            cache.free(slot)

    def reorder() -> None:
        family = family_of[rng.choice(list(running))] if running else None
        alike = [slot for slot in running if family_of[slot] == family]
        if len(alike) > 1 and len(running[alike[0]]) < ends[alike[0]]:
            parents = [rng.randrange(len(alike)) for _ in alike]
            tokens = [list(running[alike[parent]]) for parent in parents]
            done = [committed[alike[parent]] for parent in parents]
            cache.reorder(alike, parents, len(tokens[0]))
            for slot, mine, full in zip(alike, tokens, done, strict=True):
                running[slot], committed[slot] = mine, full
            counts["reorders"] = counts.get("reorders", 0) + 1

    def pin() -> None:
        names = names_of(*rng.choice(prefixes))
        rng.choice([cache.pin, cache.unpin])(names)

    actions = [*[begin] * 6, *[grow] * 12, *[commit] * 6, end, end, reorder, reorder, pin]
    for _ in range(700):
        rng.choice(actions)()
        if rng.random() < 0.005:
            cache.reset()
        cache.check()
    assert counts["hits"] > 0
    assert counts["forks"] > 0
    for slot in list(running):
        cache.free(slot)
    cache.unpin_all()
    cache.check()
    assert cache.num_used_blocks == 0
