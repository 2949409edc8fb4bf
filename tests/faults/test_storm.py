"""The short storm: faults on the whole product, and nothing lost, doubled, hung, cut or changed.

`make faults` is the long one. The seed is fixed, so that a red run can be had again; `python -m tests.faults --seed`
takes others.
"""

from pathlib import Path

import pytest

from tests.faults.__main__ import PACE
from tests.faults.box import FullBox
from tests.faults.storm import FIGURES, Plan, storm

SEED = 53  # most kinds of faults among its first twenty, one killed supervisor among its first sixty


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("faults", [20, pytest.param(60, marks=pytest.mark.faults)])
async def test_faults_break_no_promise(tmp_path: Path, faults: int) -> None:
    with FullBox(tmp_path, PACE) as box:
        outcome = await storm(box, Plan(SEED, faults=faults, pause_s=2.2, within_s=600.0))
    print("\n".join(outcome.lines()))
    assert [str(violation) for violation in outcome.report.violations] == []
    assert {name: outcome.report.counts[name] for name in FIGURES} == dict.fromkeys(FIGURES, 0)
    assert len(outcome.done) == faults
    assert outcome.report.counts["runs completed"] > 0
