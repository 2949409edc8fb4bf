"""The lines of `onebox.logs`."""

import asyncio
import json
import logging
from collections.abc import Callable

import pytest

from onebox import logs

SECRET = "what the user wrote"


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("agents.runs", logging.WARNING, "runs.py", 1, message, (), info)  # type: ignore[arg-type]


def raised() -> BaseException:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise ExceptionGroup(SECRET, [KeyError(SECRET)]) from error
    except ExceptionGroup as error:
        return error


@pytest.mark.parametrize("make", [logs.TextLines, logs.JsonLines])
def test_an_exception_is_its_types_and_frames_and_only_debug_adds_its_words(
    make: Callable[[dict[str, str], bool], logging.Formatter],
) -> None:
    quiet, loud = make({"part": "gateway"}, False), make({"part": "gateway"}, True)
    line = quiet.format(record("Run failed", raised()))
    assert SECRET not in line
    for word in ("ValueError", "KeyError", "ExceptionGroup", "in raised"):
        assert word in line
    assert SECRET in loud.format(record("Run failed", raised()))


def test_lines_of_a_task_and_its_children_name_its_run_and_no_other_task_does() -> None:
    lines = logs.JsonLines({"part": "gateway", "worker": "1"}, False)

    async def child() -> dict[str, str]:
        return dict(json.loads(lines.format(record("hello"))))

    async def run(name: str) -> dict[str, str]:
        logs.bind(run=name, tenant="acme")
        await asyncio.sleep(0)
        return await asyncio.create_task(child())

    async def main() -> list[dict[str, str]]:
        return [*await asyncio.gather(asyncio.create_task(run("a")), asyncio.create_task(run("b"))), await child()]

    one, two, outside = asyncio.run(main())
    assert (one["run"], two["run"], outside.get("run")) == ("a", "b", None)
    assert one["tenant"] == two["tenant"] != "acme"
    assert (one["part"], one["worker"], one["level"]) == ("gateway", "1", "warning")


def test_a_text_line_ends_with_what_it_is_about() -> None:
    async def main() -> str:
        logs.bind(run="r1")
        return logs.TextLines({"part": "gateway", "worker": "0"}, False).format(record("hello"))

    assert asyncio.run(main()).endswith("WARNING agents.runs hello [run=r1 worker=0]")
