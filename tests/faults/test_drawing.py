"""Drawn faults: the same seed is the same storm."""

from itertools import islice

from tests.faults.box import FullBox, LightBox
from tests.faults.faults import ON_PROCESSES, WEIGHTS, draw


def test_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    first, again, other = (list(islice(draw(seed, FullBox.roles, 3.0), 300)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_of_fault_is_drawn_and_some_strike_at_once() -> None:
    drawn = list(islice(draw(3, FullBox.roles, 3.0), 3000))
    assert {(fault.act, fault.role) for fault in drawn} == set(WEIGHTS)
    assert any(fault.after_s < 0.4 for fault in drawn)
    assert 2.5 < sum(fault.after_s for fault in drawn) / len(drawn) < 3.5


def test_a_box_gets_no_fault_for_a_process_it_has_not() -> None:
    drawn = islice(draw(3, LightBox.roles, 3.0), 1000)
    assert {fault.role for fault in drawn if fault.act in ON_PROCESSES} <= set(LightBox.roles)
