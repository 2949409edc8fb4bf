"""docs/benchmarks.md: one section per benchmark, each replaced by its own run."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.product import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """\
# Benchmarks

Each section is written by the command it names. Product and peers run side by side on one machine, rounds
interleaved, medians of the rounds; ratios are what counts, absolute numbers are this machine's.
"""


def machine() -> str:
    """Processor, cores and commit, in a line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ("git", "rev-parse", "--short", "HEAD"), cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return f"{model}, {os.cpu_count()} cores, commit {commit}, {time.strftime('%Y-%m-%d')}"


def load_average() -> str:
    """The machine's load over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def write_section(name: str, title: str, text: str) -> None:
    """Replace (or add) the section `name` of the page."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n## {title}\n\n`make bench ARGS={name}` · {machine()}\n\n{text}\n{end}\n"
    if start in page:
        before, _, rest = page.partition(start)
        page = before + section + rest.partition(end)[2].lstrip("\n")
    else:
        page = page.rstrip("\n") + "\n\n" + section
    PAGE.write_text(page, encoding="utf-8")
    print(section)
