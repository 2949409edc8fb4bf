"""How many replicas a fleet wants for the load that it has."""

import pickle
from types import SimpleNamespace

import pytest

from serving.autoscaling import LoadPolicy, wanted


@pytest.mark.parametrize(
    ("replicas", "work", "caches", "expected"),
    [
        (1, 0.0, 0.0, 1),
        (1, 0.5, 0.1, 1),
        (1, 0.81, 0.1, 2),
        (1, 5.0, 0.1, 7),  # a queue: as many as would serve it all at once
        (2, 0.4, 1.7, 3),  # caches are nearly full before the places are
        (4, 2.5, 0.0, 4),  # fewer would be too full again: neither grows nor shrinks
        (4, 1.7, 0.0, 3),
        (4, 0.1, 0.0, 1),
    ],
)
def test_fleet_wants(replicas: int, work: float, caches: float, expected: int) -> None:
    assert wanted(replicas, work, caches) == expected


def test_a_size_that_was_chosen_is_kept_under_the_same_load() -> None:
    for percent in range(1, 1000):
        work = percent / 100
        size = wanted(1, work, 0.0)
        assert wanted(size, work, 0.0) == size


def test_policy_adds_up_what_the_replicas_report_and_not_what_serve_counts() -> None:
    policy = pickle.loads(pickle.dumps(LoadPolicy(places=4)))
    reported = {
        "begun": {"a": 1.0, "b": 0.0},
        "running": {"a": 4.0, "b": 3.0},
        "waiting": {"a": 2.0, "b": 0.0},
        "queued": {"a": 0.0, "b": 3.0},
        "kv_use": {"a": 0.2, "b": 0.1},
    }
    context = SimpleNamespace(
        current_num_replicas=2, target_num_replicas=2, aggregated_metrics=reported, total_num_requests=1000.0
    )
    assert policy(context) == (4, {})
    context.aggregated_metrics = reported | {name: {"a": 0.0} for name in ("running", "waiting", "queued")}
    assert policy(context) == (1, {})  # requests come, but are gone whenever the replica is asked
    context.aggregated_metrics = {name: {"a": 0.0} for name in reported} | {"kv_use": {"a": 0.9}}
    assert policy(context) == (0, {})  # what a cache still holds is no work
    context.aggregated_metrics = {}
    assert policy(context) == (2, {})  # nobody has told yet


def test_sleeping_fleet_is_left_to_serve() -> None:
    context = SimpleNamespace(current_num_replicas=0, target_num_replicas=1, aggregated_metrics={})
    assert LoadPolicy(places=4)(context) == (1, {})
