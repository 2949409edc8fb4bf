"""The choice among replicas: keys stay together, load stays even, few keys move when the fleet changes."""

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from agents.doors import BOUND, Doors

CAPACITY = 64


def url(number: int) -> str:
    return f"http://127.0.0.1:{9000 + number}"


def record(number: int, running: int = 0, waiting: int = 0, **fields: object) -> dict[str, object]:
    """A replica as the roster has it."""
    load = {"door": url(number), "running": running, "waiting": waiting, "capacity": CAPACITY}
    return load | {"kv_use": 0.0, "tokens": 0, "draining": False, "placed": []} | fields


def doors_of(records: Iterable[dict[str, object]]) -> Doors:
    """Doors of which all can be reached."""
    doors, listed = Doors(), list(records)
    doors.list(listed)
    for one in listed:
        doors.prove(str(one["door"]), answers=True)
    return doors


def test_a_key_keeps_its_door() -> None:
    doors = doors_of(record(number) for number in range(4))
    first = {key: doors.choose(key)[0] for key in map(str, range(200))}
    assert {key: doors.choose(key)[0] for key in first} == first
    assert set(first.values()) == set(map(url, range(4)))


def test_gateways_that_know_nothing_of_each_other_mostly_agree() -> None:
    one, other = (doors_of(record(number) for number in range(4)) for _ in range(2))
    keys = [str(number) for number in range(100)]
    assert [one.choose(key)[0] for key in keys] == [other.choose(key)[0] for key in keys]


def test_a_gateway_learns_from_the_roster_where_another_has_placed_a_key() -> None:
    hashed = doors_of(record(number) for number in range(4)).choose("key")[0]
    elsewhere = next(url(number) for number in range(4) if url(number) != hashed)
    told = doors_of(record(number, placed=["key"] if url(number) == elsewhere else []) for number in range(4))
    assert told.choose("key")[0] == elsewhere


def test_key_leaves_a_door_that_is_far_above_its_part_and_goes_to_an_idle_one() -> None:
    doors = doors_of(record(number) for number in range(4))
    home = doors.choose("key")[0]
    doors.list([record(number, running=40 if url(number) == home else 4) for number in range(4)])
    away = doors.choose("key")[0]
    assert away != home
    doors.list([record(number, running=40 if url(number) == away else 4) for number in range(4)])
    assert doors.choose("key")[0] != away


def test_no_door_gets_more_than_the_bound_allows_while_many_requests_are_open() -> None:
    doors, draw = doors_of(record(number) for number in range(4)), random.Random(3)
    loads: Counter[str] = Counter()
    for _ in range(200):  # few keys, one of them hot
        door = doors.choose("hot" if draw.random() < 0.5 else str(draw.randrange(20)))[0]
        doors.enter(door)
        loads[door] += 1
        assert loads[door] <= max(BOUND * (sum(loads.values()) + 1) / 4 + 1, CAPACITY // 8)


def test_request_without_a_key_goes_to_the_least_loaded() -> None:
    doors = doors_of(record(number, running=5 - number) for number in range(4))
    assert doors.choose(None)[0] == url(3)
    for _ in range(2):
        doors.enter(url(3))
    assert doors.choose(None)[0] == url(2)


def test_own_requests_that_the_roster_has_counted_are_not_counted_twice() -> None:
    doors = doors_of([record(0), record(1)])
    doors.enter(url(0))
    doors.list([record(0, running=1), record(1)])
    door = doors.get(url(0))
    assert door is not None
    assert door.load == 1
    doors.leave(url(0))
    assert door.load == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_few_keys_move_when_a_replica_comes_or_goes(change: int) -> None:
    keys, before = [str(number) for number in range(1000)], doors_of(record(number) for number in range(4))
    after = doors_of(record(number) for number in range(4 + change))
    homes, now = ({key: doors.choose(key)[0] for key in keys} for doors in (before, after))
    moved = sum(homes[key] != now[key] for key in keys)
    assert 0.1 < moved / len(keys) < 0.4  # a fourth or a fifth, for gateways that have forgotten


def test_keys_stay_where_they_are_when_the_fleet_grows() -> None:
    doors, keys = doors_of(record(number) for number in range(2)), [str(number) for number in range(100)]
    homes = {key: doors.choose(key)[0] for key in keys}
    doors.list([record(number) for number in range(4)])
    for number in range(4):
        doors.prove(url(number), answers=True)
    assert {key: doors.choose(key)[0] for key in keys} == homes
    assert {doors.choose(f"new {key}")[0] for key in keys} == set(map(url, range(4)))


def test_replicas_that_leave_or_drain_or_are_not_reached_get_nothing() -> None:
    doors = doors_of(record(number) for number in range(4))
    doors.list([record(0), record(1, draining=True), record(2)])
    doors.prove(url(2), answers=False)
    doors.hear(url(7))  # answers, but is in no roster
    assert {doors.choose(str(number))[0] for number in range(50)} == {url(0)}
    doors.list([])
    assert doors.choose("key") == ()


def test_replica_whose_cache_is_full_has_no_more_places_than_requests() -> None:
    doors = doors_of([record(0, running=9, kv_use=0.97), record(1, running=9, kv_use=0.5), record(2, kv_use=1.0)])
    assert [door.places for door in doors.listed()] == [9, CAPACITY, 1]
