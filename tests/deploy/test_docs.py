"""Pages made from code say what the code says."""

import re
import subprocess
from pathlib import Path

import pytest

from deploy.__main__ import settings_page

ROOT = Path(__file__).resolve().parent.parent.parent
READMES = ("README.md", "README.zh-CN.md")


def test_the_settings_page_is_what_the_code_gives() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page()


@pytest.mark.parametrize("name", READMES)
def test_every_make_command_of_a_readme_is_a_target(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = {words.split()[1] for words in re.findall(r"^\$ (make \S+)", text, re.MULTILINE)}
    targets |= set(re.findall(r"`make (\w+)`", text))
    assert {"up", "test"} <= targets
    for target in targets:
        done = subprocess.run(("make", "-n", target), cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", READMES)
def test_every_file_a_readme_links_to_exists(name: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
        assert link.startswith("http") or (ROOT / link).exists(), link
