"""The registry lets in what is on the list and keeps the contract, and says clearly why it lets in nothing else."""

import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ConfigDict

from onebox.contract import find_faults
from onebox.errors import SetupError
from onebox.events import Event, TextDelta
from onebox.plugin import Context, Example, Lang, Plugin, Task, TaskParams
from onebox.settings import read_settings
from onebox.testing import check_plugin, collect, text_of
from plugins.registry import load_plugins

SOURCE = """
from onebox.events import TextDelta
from onebox.plugin import Example, Plugin

class Echo(Plugin):
    name, version = "{name}", "1.0"
    title = {{"en": "Echo", "zh": "回声"}}
    summary = {{"en": "Say it again", "zh": "再说一遍"}}
    examples = [Example(lang, text) for lang in ("en", "zh") for text in ("a", "b", "c")]

    async def run(self, task, ctx):
        yield TextDelta(task.text)
"""


class Sound(Plugin):
    """A plugin without a fault, for tests to break."""

    name = "sound"
    version = "1.0"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Sound", "zh": "好"}
    summary: ClassVar[Mapping[Lang, str]] = {"en": "Sound", "zh": "好"}
    examples = (*(Example("en", text) for text in "abc"), *(Example("zh", text) for text in "甲乙丙"))

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        yield TextDelta(task.text)


def install(folder: Path, module: str, source: str, entries: Mapping[str, str]) -> None:
    """A distribution as an installer leaves it."""
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[onebox.plugins]\n{lines}")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for module in set(sys.modules) - before:
        if module.startswith("onebox_plugin_"):
            del sys.modules[module]


def test_built_in_plugins_load_in_the_order_of_the_list() -> None:
    assert list(load_plugins(["write", "chat", "qa"])) == ["write", "chat", "qa"]


def test_default_settings_load_all_six() -> None:
    loaded = load_plugins(read_settings().plugins)
    assert list(loaded) == ["summarize", "translate", "qa", "reason", "write", "chat"]
    assert {plugin.name for plugin in loaded.values()} == set(loaded)


async def test_third_party_plugin_on_the_path_is_found_and_runs(site: Path) -> None:
    install(site, "onebox_plugin_echo", SOURCE.format(name="echo"), {"echo": "onebox_plugin_echo:Echo"})
    loaded = load_plugins(["chat", "echo"])
    assert text_of(await collect(loaded["echo"], "hello there")) == "hello there"


def test_plugin_that_is_not_on_the_list_is_not_even_imported(site: Path) -> None:
    install(site, "onebox_plugin_bomb", "raise SystemExit(1)", {"bomb": "onebox_plugin_bomb:Bomb"})
    assert list(load_plugins(["chat"])) == ["chat"]
    assert "onebox_plugin_bomb" not in sys.modules


def test_plugin_that_is_not_installed_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        SetupError, match=r"'poem' is not installed; installed: .*'chat'.*'write'.* Install the package"
    ):
        load_plugins(["chat", "poem"])


def test_plugin_that_cannot_be_imported_says_why(site: Path) -> None:
    install(site, "onebox_plugin_broken", "import nowhere_to_be_found", {"broken": "onebox_plugin_broken:Broken"})
    with pytest.raises(SetupError, match=r"'broken' cannot be imported .*nowhere_to_be_found.*Repair its package"):
        load_plugins(["broken"])


def test_name_claimed_by_two_packages_is_refused(site: Path) -> None:
    for module in ("onebox_plugin_one", "onebox_plugin_two"):
        install(site, module, SOURCE.format(name="twin"), {"twin": f"{module}:Echo"})
    with pytest.raises(SetupError, match=r"'twin' is installed twice.*Uninstall one"):
        load_plugins(["twin"])


def test_entry_point_and_class_must_agree_on_the_name(site: Path) -> None:
    install(site, "onebox_plugin_alias", SOURCE.format(name="other"), {"alias": "onebox_plugin_alias:Echo"})
    with pytest.raises(SetupError, match=r"'alias' .*calls itself 'other'"):
        load_plugins(["alias"])


def test_plugin_that_breaks_the_contract_is_refused_with_each_fault(site: Path) -> None:
    source = SOURCE.format(name="poor").replace('("a", "b", "c")', '("a",)')
    install(site, "onebox_plugin_poor", source, {"poor": "onebox_plugin_poor:Echo"})
    with pytest.raises(SetupError, match=r"There are 1 examples in 'en', .* There are 1 examples in 'zh'"):
        load_plugins(["poor"])


@pytest.mark.parametrize(("allowed", "message"), [([], "is empty"), (["chat", "chat"], "'chat' is listed twice")])
def test_list_itself_must_make_sense(allowed: list[str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        load_plugins(allowed)


def _needy() -> type[TaskParams]:
    class Needy(TaskParams):
        depth: int

    return Needy


def _odd() -> type[TaskParams]:
    class Odd(TaskParams):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        thing: Path | object | None = None
        call: type[Plugin] = Sound

    return Odd


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api": 2}, "written for plugin API 2; this Onebox has API 1"),
        ({"name": "No Good"}, "name 'No Good' is not usable"),
        ({"title": {"en": "Only English"}}, "no title in 'zh'"),
        ({"summary": {"en": " ", "zh": "好"}}, "no summary in 'en'"),
        ({"examples": ("a", "b")}, "'examples' is not a list of"),
        ({"counter_examples": (Example("fr", "non"),)}, "has the language 'fr'"),  # type: ignore[arg-type]
        ({"Params": dict}, "not a subclass of onebox.plugin.TaskParams"),
        ({"Params": _needy()}, "option 'depth' has no default"),
        ({"Params": _odd()}, "no JSON schema"),
        ({"run": lambda self, task, ctx: None}, "not an async generator"),
        ({"version": ""}, "version '' is not a text"),
    ],
)
def test_each_fault_of_a_class_is_named(changes: dict[str, object], message: str) -> None:
    faults = find_faults(type("Changed", (Sound,), changes))
    assert len(faults) == 1
    assert message in faults[0]


def test_class_that_is_no_plugin_is_named() -> None:
    assert "not a subclass" in find_faults(str)[0]
    assert "no 'name', 'version'" in find_faults(type("Bare", (Plugin,), {"run": Sound.run}))[0]


@pytest.mark.parametrize("name", ["summarize", "translate", "qa", "reason", "write", "chat"])
def test_built_in_plugins_have_starters_and_counter_examples_in_both_languages(name: str) -> None:
    plugin = load_plugins([name])[name]
    check_plugin(type(plugin))
    for lang in ("en", "zh"):
        assert sum(example.lang == lang for example in plugin.examples) >= 4
        assert sum(example.lang == lang for example in plugin.counter_examples) >= 2
