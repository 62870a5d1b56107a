from __future__ import annotations

from inlay.runtime.block_pool import block_hash
from inlay.runtime.host_cache import HostCache

A, B, C, D = (block_hash(None, [number], None) for number in range(4))


def test_the_oldest_goes_first() -> None:
    host = HostCache(2)
    first, second = host.put(A), host.put(B)
    assert {first, second} == {(0, None), (1, None)}
    assert host.put(C) == (first[0], A)
    assert (A in host, B in host, C in host, len(host)) == (False, True, True, 2)
    host.check()


def test_what_is_put_again_keeps_its_place_and_is_the_youngest() -> None:
    host = HostCache(2)
    place = host.put(A)
    host.put(B)
    assert host.put(A) == place
    assert host.put(C)[1] == B
    host.check()


def test_a_place_that_is_read_is_nobodys() -> None:
    host = HostCache(1)
    place, _ = host.put(A)
    assert host.pop(A) == place
    assert A not in host
    assert host.put(B) == (None, None), "its only place is being read"
    assert place is not None
    host.give_back(place)
    assert host.put(B) == (place, None)
    host.check()


def test_no_places() -> None:
    host = HostCache(0)
    assert host.put(A) == (None, None)
    assert A not in host
    host.check()


def test_forgotten_places_are_free() -> None:
    host = HostCache(3)
    places = [host.put(name)[0] for name in (A, B, C)]
    assert places[1] is not None
    host.forget_place(places[1])
    host.forget_place(places[1])
    assert [name in host for name in (A, B, C)] == [True, False, True]
    assert host.put(D) == (places[1], None)
    host.check()
    host.forget_all()
    assert len(host) == 0
    host.check()
