"""The README's programs do what they say, against the running product."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.product import KEY, ROOT, Product

BLOCKS = [
    pytest.param(page, kind, block, id=f"{page} {kind} {index}")
    for page in ("README.md", "README.zh-CN.md", "docs/api.md")
    for index, (kind, block) in enumerate(
        re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "kind", "block"), BLOCKS)
def test_the_block_runs(scripted_product: Product, tmp_path: Path, page: str, kind: str, block: str) -> None:
    code = block.replace("http://127.0.0.1:8080", scripted_product.api_url)
    assert code != block, "a block that talks to no server proves nothing"
    argv = (sys.executable, "-c", code) if kind == "python" else ("bash", "-euo", "pipefail", "-c", code)
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        env={**os.environ, "ONEBOX_KEY": KEY, "ONEBOX_ADMIN_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert '"error":{' not in done.stdout, done.stdout
