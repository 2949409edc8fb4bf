"""The scripted context keeps its word: it records, it repeats, and it objects."""

from collections.abc import AsyncGenerator

import pytest

from onebox.errors import Overloaded
from onebox.events import Completed, Event, TextDelta
from onebox.messages import user
from onebox.plugin import Context, Sampling, Task
from onebox.testing import ScriptedContext, check_plugin, check_replay, collect, text_of
from plugins.repetition import goes_in_circles
from plugins.write import Write
from tests.plugins.test_registry import Sound


class Everything(Sound):
    """Uses every door of the context."""

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        await ctx.put("seen", task.text)
        chosen = await ctx.llm.choose(task.messages, ["yes", "no"])
        whole = await ctx.llm.complete(task.messages, Sampling())
        nearest = await ctx.retrieve("red ship", ["green tree", "a red ship sails"], 1)
        yield TextDelta(
            f"{chosen.option} {whole.text} {nearest} {await ctx.get('seen')} {ctx.now():.0f} {ctx.random.random()}"
        )


class Forger(Sound):
    """Sends what is the executor's to send."""

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        yield Completed()


class Moody(Sound):
    """Remembers runs, so that no two are the same."""

    runs = 0

    async def run(self, task: Task, ctx: Context) -> AsyncGenerator[Event, None]:
        self.runs += 1
        yield TextDelta(str(self.runs))


async def test_run_over_the_same_script_is_the_same() -> None:
    events = await check_replay(Everything(), "hello", replies=["yes", "whole"])
    assert text_of(events).startswith("yes whole [1] hello 1767225600 0.84")


async def test_plugin_that_differs_between_runs_is_found() -> None:
    with pytest.raises(AssertionError, match="other events"):
        await check_replay(Moody(), "hello", replies=[])


async def test_event_that_is_not_a_plugin_s_is_refused() -> None:
    with pytest.raises(AssertionError, match="not a plugin's to send"):
        await collect(Forger(), "hello")


async def test_call_beyond_the_script_is_refused() -> None:
    with pytest.raises(AssertionError, match="engine call 2; the script has 1 replies"):
        await collect(Everything(), "hello", replies=["yes"])


async def test_scripted_error_is_raised_in_the_plugin() -> None:
    with pytest.raises(Overloaded):
        await collect(Everything(), "hello", replies=[Overloaded("full", retry_after_s=1.0)])


async def test_streamed_reply_comes_in_pieces_that_join() -> None:
    ctx = ScriptedContext(["One two three,\n四五六七八九十."])
    pieces = [delta.text async for delta in ctx.llm.stream([user("x")], Sampling())]
    assert "".join(pieces) == "One two three,\n四五六七八九十."
    assert len(pieces) >= 4


def test_class_with_a_fault_fails_its_check() -> None:
    check_plugin(Sound)
    with pytest.raises(AssertionError, match="no title in 'zh'"):
        check_plugin(type("Mute", (Sound,), {"title": {"en": "x"}}))


async def test_reply_that_goes_in_circles_is_ended() -> None:
    events = await collect(Write(), "Write a letter", replies=["Dear all, " + "I am so sorry for this. " * 40])
    assert len(text_of(events)) < 300
    assert getattr(events[-1], "name", None) == "repetition"


async def test_repetition_that_was_asked_for_is_kept() -> None:
    events = await collect(Write(), "Write it 40 times", replies=["I will be good. " * 40])
    assert text_of(events) == "I will be good. " * 40


@pytest.mark.parametrize(
    "text", ["", "No, no, no!", "".join(f"{row}. A line of a list\n" for row in range(60)), "La la la. " * 5]
)
def test_text_that_moves_on_is_not_called_a_circle(text: str) -> None:
    assert not goes_in_circles(text)
