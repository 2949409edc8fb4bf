"""The short storm: sixty faults on the whole product, and nothing lost, doubled, hung, cut or changed.

`make faults` is the long one. The seed is fixed, so that a red run can be had again; `python -m tests.faults --seed`
takes others.
"""

from pathlib import Path

import pytest

from tests.faults.__main__ import PACE
from tests.faults.box import FullBox
from tests.faults.storm import FIGURES, Plan, storm

SEED = 53  # one killed supervisor, and all but a few kinds of faults


FAULTS = 60


@pytest.mark.timeout(1200)
async def test_sixty_faults_break_no_promise(tmp_path: Path) -> None:
    with FullBox(tmp_path, PACE) as box:
        outcome = await storm(box, Plan(SEED, faults=FAULTS, pause_s=2.2, within_s=600.0))
    print("\n".join(outcome.lines()))
    assert [str(violation) for violation in outcome.report.violations] == []
    assert {name: outcome.report.counts[name] for name in FIGURES} == dict.fromkeys(FIGURES, 0)
    assert len(outcome.done) == FAULTS
    assert outcome.report.counts["runs completed"] > 0
