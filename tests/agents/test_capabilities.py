"""What the box says it can do: measured, the same in the API and in the chat, and honest about what it cannot."""

import json

import httpx
import pytest

from agents.capabilities import Pace
from agents.reader.reader import QUALITY
from onebox.client import Client
from onebox.testing import collect, text_of
from plugins.chat import Chat
from tests.agents.processes import ADMIN_KEY, Stack


async def test_capabilities_name_tasks_limits_health_and_quality(stack: Stack) -> None:
    async with Client(stack.url, ADMIN_KEY) as client:
        known = await client.capabilities()
    assert known.health == "ready"
    assert known.models == ("scripted",)
    assert {task.name for task in known.tasks} == {"chat", "summarize", "translate", "qa", "reason", "write"}
    for task in known.tasks:
        assert [example.lang for example in task.examples] == ["en"] * 3 + ["zh"] * 3
    assert known.limits.context_tokens
    assert known.limits.reply_tokens > 0
    assert set(known.cannot) == {"en", "zh"}
    measured = json.loads(QUALITY.read_text(encoding="utf-8"))
    assert known.quality is not None
    assert known.quality.routed_right == measured["routed_right"]
    assert {lang.code for lang in known.languages} == set(measured["languages"])
    assert {task.name: task.routed_right for task in known.tasks} == measured["tasks"]


@pytest.mark.parametrize(("question", "lang"), [("What can you do?", "en"), ("你能做什么？", "zh")])
def test_question_what_it_can_do_is_answered_from_the_same_object(api: httpx.Client, question: str, lang: str) -> None:
    known = api.get("/v1/capabilities").json()
    said = api.post("/v1/tasks/chat", json={"text": question}).json()["text"]
    for task in known["tasks"]:
        assert task["title"][lang] in said
        assert task["summary"][lang] in said
    for line in known["cannot"][lang]:
        assert line in said
    assert "scripted" in said
    assert str(known["limits"]["context_tokens"]) in said


async def test_answer_leaves_out_what_is_not_known_yet() -> None:
    text = text_of(await collect(Chat(), "what can you do"))
    assert "tokens a second" not in text
    assert "test messages" not in text
    assert "Chinese, English" in text


def test_speed_is_the_median_of_the_latest_replies() -> None:
    pace = Pace()
    assert pace.speed().tokens_per_s is None
    for first_s, tokens, seconds in ((0.1, 11, 1.1), (0.3, 21, 1.3), (9.0, 101, 10.0)):
        pace.note(first_s, tokens, seconds)
    pace.note(0.1, 1, 0.2)  # one token has no pace
    speed = pace.speed()
    assert (speed.replies, speed.first_text_s, speed.tokens_per_s) == (3, 0.3, 20.0)
