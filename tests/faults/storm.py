"""One storm: users at work, faults from a seed, then quiet, then the verdict."""

import asyncio
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from onebox.events import Failed
from tests.faults import snapshot
from tests.faults.box import Box
from tests.faults.checker import Report, check
from tests.faults.clients import PATIENCE_S, Storefront, users
from tests.faults.faults import Injected, Injector, draw
from tests.faults.history import Attempt
from tests.faults.undisturbed import Undisturbed

USERS: Final = 24
BACK_WITHIN_S: Final = 120.0
GAP_S: Final = 0.3  # a reply that pauses longer than this after a fault was touched by it
FIGURES: Final = (
    "lost",
    "duplicates",
    "hung",
    "without a terminal event",
    "terminal events too many",
    "text differences",
    "views that differ from the log",
    "conversations that differ from the log",
    "states that differ",
    "late writes",
    "turns interleaved",
    "broken logs",
    "leases left",
    "wrong refusals",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of a storm."""

    seed: int
    faults: int
    pause_s: float
    within_s: float
    users: int = USERS


@dataclass
class Outcome:
    """What a storm left."""

    plan: Plan
    report: Report
    done: Sequence[Injected]
    skipped: int
    attempts: Sequence[Attempt]
    storm_s: float
    quiet_s: float
    disconnects: int
    failures: Counter[str]
    gaps: dict[str, list[float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The table."""
        counts = self.report.counts
        kinds = Counter(each.fault.name for each in self.done)
        told = [
            f"seed {self.plan.seed}: {len(self.done)} faults in {self.storm_s:.0f} s ({self.skipped} had no victim), "
            f"{self.plan.users} users, {self.disconnects} connections broken by them; quiet after {self.quiet_s:.1f} s",
            "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())),
            ", ".join(
                f"{name} {counts[name]}"
                for name in (
                    "messages sent",
                    "acknowledged",
                    "runs",
                    "runs completed",
                    "runs failed",
                    "runs stopped",
                )
            ),
        ]
        if self.failures:
            told.append("runs failed with: " + ", ".join(f"{code} {n}" for code, n in self.failures.most_common()))
        told += [f"{name:40} {counts[name]:6}" for name in FIGURES]
        for role, gaps in sorted(self.gaps.items()):
            told.append(
                f"{role + ' to next token':40} {len(gaps):6} replies, p50 {_share(gaps, 0.5):.2f} s, "
                f"p99 {_share(gaps, 0.99):.2f} s, longest {max(gaps, default=0):.2f} s"
            )
        refusals = Counter(refusal for attempt in self.attempts for refusal in attempt.refusals)
        told.append("refusals: " + ", ".join(f"{name} {count}" for name, count in refusals.most_common(12)))
        told += [str(violation) for violation in self.report.violations[:40]]
        return told


async def storm(box: Box, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Let the faults of `plan` loose on a box that is ready, with users at work, and judge."""
    front = Storefront(box.api_url, box.headers)
    injector = Injector(box, front.cut)
    crowd = [asyncio.create_task(user.live()) for user in users(plan.users, plan.seed, front)]
    began = time.monotonic()
    try:
        schedule = draw(plan.seed, box.roles, plan.pause_s)
        while len(injector.done) < plan.faults and time.monotonic() - began < plan.within_s:
            fault = next(schedule)
            await asyncio.sleep(fault.after_s)
            if await injector.inject(fault) and (fault.act, fault.role) == ("kill", "supervisor"):
                with suppress(RuntimeError):  # everything is gone; without victims there are no faults
                    await asyncio.to_thread(box.wait_until_ready, BACK_WITHIN_S)
            say(f"{time.monotonic() - began:7.1f} s  {len(injector.done):4} {fault.name}")
        storm_s = time.monotonic() - began
        await injector.calm()
        await asyncio.to_thread(box.wait_until_ready)
        calm_at = time.monotonic()
        quiet = asyncio.create_task(asyncio.to_thread(_wait_for_ends, box, calm_at))
        front.closing.set()
        await asyncio.wait(crowd, timeout=2 * PATIENCE_S)
        quiet_s = await quiet
    finally:
        for task in crowd:
            task.cancel()
        ended = await asyncio.gather(*crowd, return_exceptions=True)
        await injector.calm()
    for error in ended:
        if isinstance(error, Exception):
            raise error
    taken, asked = await asyncio.to_thread(snapshot.read, box, front.attempts)
    expected = await snapshot.expectations(asked, Undisturbed())
    report = check(front.attempts, taken, expected.get)
    failures = Counter(run.log[-1].code for run in taken.runs.values() if isinstance(run.log[-1], Failed))
    return Outcome(
        plan=plan,
        report=report,
        done=injector.done,
        skipped=injector.skipped,
        attempts=front.attempts,
        storm_s=storm_s,
        quiet_s=quiet_s,
        disconnects=front.disconnects,
        failures=failures,
        gaps=recovery(front.attempts, injector.done),
    )


def _wait_for_ends(box: Box, calm_at: float) -> float:
    """Seconds from the calm until every run accepted before it had its end, thirty at most."""
    open_runs = set(snapshot.running(box.direct))
    while open_runs and time.monotonic() - calm_at < snapshot.QUIET_WITHIN_S:
        time.sleep(0.25)
        open_runs &= set(snapshot.running(box.direct))
    return time.monotonic() - calm_at


def recovery(attempts: Sequence[Attempt], done: Sequence[Injected]) -> dict[str, list[float]]:
    """Seconds from each kill or pause of an engine or worker, alone in its time, to the next event it delayed."""
    times = sorted(each.at for each in done)
    gaps: dict[str, list[float]] = {"replica": [], "gateway": []}
    for each in done:
        role = each.fault.role
        if role not in gaps or each.fault.act not in ("kill", "pause"):
            continue
        for attempt in attempts:
            arrivals = sorted(seen.at for view in attempt.views for seen in view.seen if seen.number > 0)
            place = bisect_right(arrivals, each.at)
            if not 0 < place < len(arrivals):
                continue
            gap = arrivals[place] - each.at
            alone = bisect_right(times, each.at + gap) - bisect_right(times, each.at - 2.0) == 1
            if gap > GAP_S and alone:
                gaps[role].append(gap)
    return gaps


def _share(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
