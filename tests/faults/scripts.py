"""The names of the Lua scripts that a command on the wire runs, by their hashes."""

from hashlib import sha1
from typing import Final

from agents import conversation_scripts, run_scripts
from tests.faults.redis_proxy import Command, Match

NAMES: Final = {
    sha1(value.encode()).hexdigest(): name
    for module in (run_scripts, conversation_scripts)
    for name, value in vars(module).items()
    if name.isupper() and not name.startswith("_") and isinstance(value, str)
}


def name_of(command: Command) -> str:
    """The script's name, or the command's and what kind of key it is about."""
    if command.script is not None:
        return NAMES.get(command.script, "unknown script")
    return command.verb


def runs(*names: str) -> Match:
    """Matches the scripts of these names."""
    assert set(names) <= set(NAMES.values()), names
    return lambda command: command.script is not None and NAMES.get(command.script) in names
