"""A worker dies at each store command of a run in turn, before it and after it, and no promise is broken."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from tests.faults import snapshot
from tests.faults.box import Box, LightBox
from tests.faults.checker import check
from tests.faults.clients import Storefront
from tests.faults.crash_points import FLOWS, TAKEN_OVER, Moment, Point, play
from tests.faults.undisturbed import Undisturbed

pytestmark = pytest.mark.faults

SETTINGS = {"lease_s": "1.5", "lease_renew_s": "0.15", "scripted_itl_ms": "25", "scripted_ttft_ms": "20"}
TRIES = 4
OF_EACH = {
    "a reply": {"BEGIN_RUN", "APPEND", "RENEW", "END_RUN"},
    "a stop": {"BEGIN_RUN", "APPEND", "END_RUN"},
    "a takeover": {"TAKE", "APPEND", "END_RUN"},
}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with LightBox(tmp_path_factory.mktemp("crash-points"), SETTINGS, workers=3) as running:
        yield running


async def pass_through(box: Box, front: Storefront, flow: str, point: Point) -> None:
    """One message with the point armed."""
    await asyncio.to_thread(box.wait_until_ready)
    async with httpx.AsyncClient(base_url=box.api_url, headers=box.headers, timeout=30, trust_env=False) as http:
        conversation = str((await http.post("/v1/conversations", json={})).json()["id"])
    point.arm()
    await play(box, front, FLOWS[flow], point.nonce, conversation)
    box.proxy.disarm()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("flow", FLOWS)
async def test_a_worker_that_dies_at_any_store_command_of(flow: str, moment: Moment, box: Box) -> None:
    front = Storefront(box.api_url, box.headers)
    later = flow == TAKEN_OVER
    clean = Point(box, f"{flow}-{moment}", later=later)
    await pass_through(box, front, flow, clean)
    assert set(clean.counts) >= OF_EACH[flow]
    struck: set[str] = set()
    for script, times in sorted(clean.counts.items()):
        for number in range(times):
            # How many appends and renewals there are is a matter of time; the first of each there always is.
            for attempt in range(TRIES if number == 0 else 1):
                nonce = f"{flow}-{moment}-{script}-{number}-{attempt}"
                point = Point(box, nonce, script, number, moment, later)
                await pass_through(box, front, flow, point)
                if point.struck.is_set():
                    struck.add(script)
                    break
    await asyncio.to_thread(snapshot.wait_until_quiet, box.direct)
    taken, asked = await asyncio.to_thread(snapshot.read, box, front.attempts)
    expected = await snapshot.expectations(asked, Undisturbed())
    report = check(front.attempts, taken, expected.get)
    print(f"{flow}, {moment}: {clean.counts.total()} points, {dict(clean.counts)}")
    assert [str(violation) for violation in report.violations] == []
    assert struck >= OF_EACH[flow]
