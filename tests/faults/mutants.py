"""Five mistakes, as changes to a copy of the source, that the judge must catch. One that does not apply is an error.

They are the classic ways to lose or double a reply; each names the scenario in which it must show.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.processes import ROOT

TREES: Final = ("onebox", "agents", "plugins", "serving", "deploy", "tests")


@dataclass(frozen=True, slots=True)
class Edit:
    """`old`, which is there exactly once, becomes `new`."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake and where it shows."""

    name: str
    scenario: str
    edits: tuple[Edit, ...]


MUTANTS: Final = (
    Mutant(
        "acknowledges before it writes",
        "a worker dies with a write on its way",
        (
            Edit(
                "agents/run_log.py",
                "            self._flight = _Flight(call, events, 1 if entries else 0, ending is not None)\n",
                "            self._flight = _Flight(call, events, 1 if entries else 0, ending is not None)\n"
                "            self.tail.publish(events)\n",
            ),
            Edit(
                "agents/run_log.py",
                "        self._entries_stored += flight.entries\n        self.tail.publish(flight.events)\n",
                "        self._entries_stored += flight.entries\n",
            ),
        ),
    ),
    Mutant(
        "does not check the epoch",
        "a paused owner comes back",
        (
            Edit(
                "agents/run_scripts.py",
                "  if run[1] ~= ARGV[1] or run[2] ~= ARGV[at] or run[3] ~= 'running' then return 'lost' end\n",
                "",
            ),
            Edit(
                "agents/run_scripts.py",
                "if run[1] ~= ARGV[2] or run[2] ~= ARGV[3] or run[3] ~= 'running' then return 'lost' end\n",
                "",
            ),
        ),
    ),
    Mutant(
        "knows no idempotency",
        "a message is sent again",
        (Edit("agents/run_scripts.py", "  if owner[1] then\n    if owner[2]", "  if false then\n    if owner[2]"),),
    ),
    Mutant(
        "sends its headers before the first frame",
        "the engine is full",
        (
            Edit(
                "agents/api/replies.py",
                "        pings = asyncio.create_task(self._keep_alive(send))\n",
                "        pings = asyncio.create_task(self._keep_alive(send))\n"
                "        self._began = True\n"
                '        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})\n',
            ),
        ),
    ),
    Mutant(
        "begins again where it should go on",
        "the engine dies",
        (
            Edit(
                "agents/engine.py",
                "                    continuations += 1\n                    broken = lost.error\n",
                "                    continuations += 1\n"
                "                    course.ids.clear()\n"
                "                    broken = lost.error\n",
            ),
        ),
    ),
)


def plant(mutant: Mutant, folder: Path) -> Path:
    """A copy of the source with the mistake in it.

    Raises:
        AssertionError: the source has changed, so that an edit no longer applies.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *TREES, "pyproject.toml"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)
    for edit in mutant.edits:
        text = (folder / edit.path).read_text(encoding="utf-8")
        found = text.count(edit.old)
        assert found == 1, f"{mutant.name!r} applies {found} times to {edit.path}: {edit.old!r}"
        (folder / edit.path).write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    return folder
