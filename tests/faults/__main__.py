"""`make faults [ARGS="--seed 7 --faults 500"]`: the long storm on the whole product, and its table."""

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.faults.box import FullBox, LightBox
from tests.faults.storm import Plan, storm

PACE: Final = {"scripted_itl_ms": "40", "scripted_ttft_ms": "20"}


def main() -> int:
    """The exit code: 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="A storm of faults on the product.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of faults and users")
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=27.0, help="longest time for the faults")
    parser.add_argument("--light", action="store_true", help="without Ray Serve, page and supervisor")
    parser.add_argument("--keep", type=Path, help="folder to keep logs and store in")
    options = parser.parse_args()
    within_s = 60 * options.minutes
    plan = Plan(options.seed, options.faults, min(3.0, 0.7 * within_s / options.faults), within_s)
    print(f"seed {plan.seed}")
    with tempfile.TemporaryDirectory(prefix="ob-faults-") as scratch:
        folder = options.keep or Path(scratch)
        with (LightBox if options.light else FullBox)(folder, PACE) as box:
            outcome = asyncio.run(storm(box, plan, lambda line: print(line, flush=True)))
    print("\n".join(outcome.lines()))
    return 1 if outcome.report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
