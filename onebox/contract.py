"""What a plugin class must have to be let in. The registry and `onebox.testing` ask the same questions.

It looks at the class and never runs its work; the contract itself is `onebox.plugin`.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Final, get_args

from onebox.plugin import API, Example, Lang, Plugin, TaskParams

EXAMPLES_MIN: Final = 3
LANGS: Final[tuple[Lang, ...]] = get_args(Lang)
NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


def find_faults(found: object) -> list[str]:
    """What keeps this from being a plugin, one sentence with its remedy each; empty when nothing does."""
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        return [f"{found!r} is not a subclass of onebox.plugin.Plugin. Derive the class from it."]
    missing = [name for name in ("name", "version", "title", "summary", "examples") if not hasattr(found, name)]
    if missing:
        return [f"The class has no {', '.join(map(repr, missing))}. Set it as a class attribute."]
    if not (isinstance(found.api, int) and found.api == API):
        return [
            f"It is written for plugin API {found.api!r}; this Onebox has API {API}. Install a version for API {API}."
        ]
    return [
        *_check_name(found),
        *_check_words(found),
        *_check_examples("examples", found.examples, EXAMPLES_MIN),
        *_check_examples("counter_examples", found.counter_examples, 0),
        *_check_params(found),
        *_check_run(found),
    ]


def _check_name(plugin: type[Plugin]) -> list[str]:
    faults = []
    if not (isinstance(plugin.name, str) and NAME.fullmatch(plugin.name)):
        faults.append(f"The name {plugin.name!r} is not usable. Use a-z, 0-9 and _, at most 32 characters.")
    if not (isinstance(plugin.version, str) and plugin.version):
        faults.append(f"The version {plugin.version!r} is not a text. Write it like '1.0'.")
    return faults


def _check_words(plugin: type[Plugin]) -> list[str]:
    faults = []
    for attribute, words in (("title", plugin.title), ("summary", plugin.summary)):
        for lang in LANGS:
            text = words.get(lang, "") if hasattr(words, "get") else ""
            if not (isinstance(text, str) and text.strip()):
                faults.append(f"There is no {attribute} in {lang!r}. Add one: the page is in {' and '.join(LANGS)}.")
    return faults


def _check_examples(attribute: str, examples: Sequence[Example], least: int) -> list[str]:
    if not (isinstance(examples, Sequence) and all(isinstance(example, Example) for example in examples)):
        return [f"{attribute!r} is not a list of onebox.plugin.Example. Write Example('en', 'Hello')."]
    faults = []
    for lang in LANGS:
        count = sum(example.lang == lang and bool(example.text.strip()) for example in examples)
        if count < least:
            faults.append(
                f"There are {count} {attribute} in {lang!r}, and the router needs at least {least}. "
                "Add messages that a user would type."
            )
    if stray := sorted({str(example.lang) for example in examples} - set(LANGS)):
        faults.append(f"{attribute!r} has the language {stray[0]!r}. Use one of {', '.join(LANGS)}.")
    return faults


def _check_params(plugin: type[Plugin]) -> list[str]:
    params = plugin.Params
    if not (inspect.isclass(params) and issubclass(params, TaskParams)):
        return [f"Params is {params!r}, not a subclass of onebox.plugin.TaskParams. Derive it from that."]
    required = [name for name, field in params.model_fields.items() if field.is_required()]
    if required:
        return [f"The option {required[0]!r} has no default, but a chat message gives no options. Add a default."]
    try:
        params.model_json_schema()
    except Exception as error:  # whatever a foreign type's schema hook raises
        return [f"Params has no JSON schema ({type(error).__name__}: {error}). Use types that JSON knows."]
    return []


def _check_run(plugin: type[Plugin]) -> list[str]:
    if inspect.isabstract(plugin):
        return ["The class has no 'run'. Write: async def run(self, task, ctx)."]
    if not inspect.isasyncgenfunction(plugin.run):
        return ["'run' is not an async generator. Write it with 'async def' and yield events."]
    return []
