"""Each scenario leaves nothing to complain of, and each mistake planted in the source leaves something."""

from pathlib import Path

import pytest

from tests.faults.box import LightBox
from tests.faults.mutants import MUTANTS, Mutant, plant
from tests.faults.scenarios import SCENARIOS, judge

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", SCENARIOS)
async def test_no_promise_is_broken_when(name: str, tmp_path: Path) -> None:
    with LightBox(tmp_path, SCENARIOS[name].settings) as box:
        report = await judge(box, SCENARIOS[name])
    assert report.counts["acknowledged"] > 0
    assert [str(violation) for violation in report.violations] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
async def test_the_judge_catches_a_gateway_that(mutant: Mutant, tmp_path: Path) -> None:
    tree = plant(mutant, tmp_path / "source")
    with LightBox(tmp_path / "box", SCENARIOS[mutant.scenario].settings, root=tree) as box:
        report = await judge(box, SCENARIOS[mutant.scenario])
    assert report.counts["acknowledged"] > 0
    assert report.violations
