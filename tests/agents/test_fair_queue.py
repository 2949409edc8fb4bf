"""Whose turn it is, by tokens: a tenant with much to do delays another by its share and no more."""

import random

from agents.fair_queue import FairQueue, Waiter


def served(queue: FairQueue, count: int, blocked: frozenset[str] = frozenset()) -> list[str]:
    """The tenants of the next `count` turns."""
    turns: list[str] = []
    for _ in range(count):
        waiter = queue.next(blocked)
        assert waiter is not None
        queue.serve(waiter)
        turns.append(waiter.tenant)
    return turns


def join(queue: FairQueue, tenant: str, count: int, cost: int = 100) -> list[Waiter]:
    return [queue.join(tenant, cost) for _ in range(count)]


def test_one_tenant_is_served_in_the_order_it_came() -> None:
    queue = FairQueue()
    waiters = [queue.join("a", cost) for cost in (500, 1, 30)]
    assert queue.order() == waiters
    assert [queue.position(waiter) for waiter in waiters] == [1, 2, 3]


def test_single_run_passes_a_hundred_of_another_tenant() -> None:
    queue = FairQueue()
    join(queue, "a", 100)
    served(queue, 10)
    single = queue.join("b", 100)
    assert queue.position(single) <= 2
    assert "b" in served(queue, 2)


def test_tenants_with_much_to_do_share_by_tokens_not_by_runs() -> None:
    queue = FairQueue()
    join(queue, "long", 50, cost=1000)
    join(queue, "short", 500, cost=100)
    turns = served(queue, 110)
    assert 9 <= turns.count("long") <= 11


def test_who_was_idle_comes_back_without_saved_turns() -> None:
    queue = FairQueue()
    join(queue, "a", 200)
    served(queue, 100)
    join(queue, "b", 50)
    assert 9 <= served(queue, 20).count("b") <= 11


def test_runs_that_did_not_wait_count_too() -> None:
    queue = FairQueue()
    for _ in range(10):
        queue.pass_by("a", 100)
    join(queue, "a", 5)
    join(queue, "b", 5)
    assert served(queue, 1) == ["b"]


def test_tenant_pays_for_what_its_runs_really_cost() -> None:
    queue = FairQueue()
    join(queue, "a", 20)
    join(queue, "b", 20)
    served(queue, 2)
    queue.charge("a", 500)
    assert served(queue, 5) == ["b"] * 5


def test_tenant_gets_back_what_its_runs_did_not_cost() -> None:
    queue = FairQueue()
    join(queue, "a", 20, cost=300)
    join(queue, "b", 20, cost=300)
    served(queue, 2)
    queue.charge("a", -250)
    assert served(queue, 1) == ["a"]


def test_blocked_tenant_is_passed_over_and_saves_up_nothing() -> None:
    queue = FairQueue()
    join(queue, "a", 30)
    join(queue, "b", 30)
    assert served(queue, 20, frozenset({"a"})) == ["b"] * 20
    assert 4 <= served(queue, 10).count("a") <= 6
    assert queue.next(frozenset({"a", "b"})) is None


def test_who_leaves_is_passed_over_and_pays_nothing() -> None:
    queue = FairQueue()
    first, second, third = join(queue, "a", 3)
    queue.leave(second)
    assert queue.order() == [first, third]
    assert (len(queue), queue.waiting_of("a"), queue.waiting_of("b")) == (2, 2, 0)


def test_position_is_the_place_in_the_order_whatever_happens() -> None:
    draw = random.Random(5)
    queue = FairQueue()
    waiting: list[Waiter] = []
    for _ in range(600):
        action = draw.random()
        if action < 0.6 or not waiting:
            waiting.append(queue.join(draw.choice("abcdef"), draw.randrange(1, 900)))
        elif action < 0.8:
            waiter = queue.next()
            assert waiter is queue.order()[0]
            assert waiter is not None
            queue.serve(waiter)
            waiting.remove(waiter)
            queue.charge(waiter.tenant, draw.randrange(-waiter.cost, 500))
        else:
            queue.leave(waiting.pop(draw.randrange(len(waiting))))
        assert [queue.position(waiter) for waiter in queue.order()] == list(range(1, len(waiting) + 1))


def test_no_tenant_waits_longer_than_its_share_whoever_else_comes() -> None:
    """With `n` tenants at work, of 10 n turns each gets its tenth, a turn more or less."""
    draw = random.Random(8)
    queue = FairQueue()
    tenants = [f"tenant {number}" for number in range(5)]
    for tenant in tenants:
        join(queue, tenant, draw.randrange(60, 200))
    for _ in range(5):
        turns = served(queue, 50)
        assert all(9 <= turns.count(tenant) <= 11 for tenant in tenants)


def test_tenants_of_long_ago_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(5000):
        queue.pass_by(f"tenant {number}", 10)
    queue.pass_by("last", 1_000_000)
    queue.pass_by("last", 1)
    for number in range(5000):
        queue.pass_by(f"other {number}", 0)
    assert len(queue._tenants) <= 1100
