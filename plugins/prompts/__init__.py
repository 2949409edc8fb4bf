"""Prompt texts: one file per task and language, `# name` before each text, `$name` where a value goes.

Texts are short because a small model on a CPU reads them before every reply, and stand first in the prompt, word for
word the same each time, so that the engine's prefix cache has them.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Final

from onebox.contract import LANGS
from onebox.plugin import Lang

_SECTION: Final = re.compile(r"^# (\w+)\n", re.MULTILINE)


class Prompts:
    """The texts of one task, read once."""

    def __init__(self, task: str) -> None:
        self._texts: Mapping[Lang, Mapping[str, Template]] = {lang: _read(task, lang) for lang in LANGS}

    def text(self, name: str, lang: Lang, **values: object) -> str:
        """The text with its values filled in. Raises `KeyError` for a text or value that is not there."""
        return self._texts[lang][name].substitute({key: str(value) for key, value in values.items()})


def _read(task: str, lang: Lang) -> dict[str, Template]:
    content = (files(__name__) / f"{task}.{lang}.md").read_text(encoding="utf-8")
    _, *parts = _SECTION.split(content)
    return {name: Template(text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)}
