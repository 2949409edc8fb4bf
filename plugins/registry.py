"""Finds plugins by their entry points and lets in those on the allow-list, each checked against the contract.

It imports nothing that is not on the list. What a plugin must have is `onebox.contract`.
"""

from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from onebox.contract import find_faults
from onebox.errors import SetupError
from onebox.plugin import ENTRY_POINT_GROUP, Plugin

SETTING = "ONEBOX_PLUGINS"


def load_plugins(allowed: Sequence[str]) -> dict[str, Plugin]:
    """One instance of each allowed plugin by name, in the order of the list.

    Raises:
        SetupError: a plugin is listed twice, not installed, installed twice, or breaks the contract.
    """
    if not allowed:
        raise SetupError(f'No plugin may load: {SETTING} is empty. List at least one, for example ["chat"].')
    if twice := sorted({name for name in allowed if list(allowed).count(name) > 1}):
        raise SetupError(f"Plugin {twice[0]!r} is listed twice in {SETTING}. List it once.")
    installed = _find_installed()
    return {name: _load(name, installed) for name in allowed}


def _find_installed() -> dict[str, list[EntryPoint]]:
    """Entry points by name. One distribution met twice on the path counts once."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        same = found.setdefault(entry.name, [])
        if entry.value not in [other.value for other in same]:
            same.append(entry)
    return found


def _load(name: str, installed: dict[str, list[EntryPoint]]) -> Plugin:
    entries = installed.get(name, [])
    if not entries:
        known = ", ".join(repr(other) for other in sorted(installed)) or "none"
        raise SetupError(
            f"Plugin {name!r} is not installed; installed: {known}. "
            f"Install the package that brings it, or take it out of {SETTING}."
        )
    if len(entries) > 1:
        values = " and ".join(repr(entry.value) for entry in entries)
        raise SetupError(f"Plugin {name!r} is installed twice, as {values}. Uninstall one of them.")
    value = entries[0].value
    try:
        found: object = entries[0].load()
    except Exception as error:  # a foreign module may raise anything at its import
        raise SetupError(
            f"Plugin {name!r} cannot be imported from {value!r}: {type(error).__name__}: {error}. "
            f"Repair its package, or take it out of {SETTING}."
        ) from error
    faults = find_faults(found)
    if faults:
        raise SetupError(f"Plugin {name!r} ({value}) cannot be used. {' '.join(faults)}")
    assert isinstance(found, type)
    assert issubclass(found, Plugin)
    if found.name != name:
        raise SetupError(f"Plugin {name!r} ({value}) calls itself {found.name!r}. Give entry point and class one name.")
    try:
        return found()
    except Exception as error:  # as above
        raise SetupError(
            f"Plugin {name!r} ({value}) cannot be made: {type(error).__name__}: {error}. "
            "Its class must work without arguments."
        ) from error
