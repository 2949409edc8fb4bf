"""The code in docs/plugins.md runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from onebox.contract import find_faults

ROOT: Final = Path(__file__).parents[2]
BLOCKS: Final = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(encoding="utf-8"), re.DOTALL)


def test_plugin_of_the_docs_has_twenty_lines_and_keeps_the_contract() -> None:
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[0], "docs/plugins.md", "exec"), scope)
    assert find_faults(scope["Haiku"]) == []
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 20


def test_every_python_block_of_the_docs_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(BLOCKS)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
