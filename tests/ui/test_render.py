from dataclasses import replace

import pytest

from onebox.events import Cue, Queued, Routed, Stopped
from onebox.records import Conversation, ConversationSummary, Problem, TaskInfo, Turn, Variant
from ui import render
from ui.reply import Update
from ui.strings import EN, ZH, Strings

EVIL = '<img src=x onerror="alert(1)">'
TASKS = (TaskInfo("translate", {"en": "Translate", "zh": "翻译"}), TaskInfo("qa", {"en": "Answer", "zh": "问答"}))
ROUTE = Routed("translate", ("translate",), {"translate": 0.97, "qa": 0.03}, "head", 4.2)


def _markup(messages: list[render.ChatMessage]) -> str:
    return "".join(part["value"] for m in messages for part in m["content"] if part["type"] == "component")


def test_text_of_users_and_models_never_becomes_the_pages_own_markup() -> None:
    variant = Variant("r1", EVIL, EVIL, ROUTE, "failed", Problem("engine_failed", EVIL))
    conversation = Conversation("c1", EVIL, turns=(Turn("t1", EVIL, variants=(variant, variant)),))
    tasks = (TaskInfo(EVIL, {"en": EVIL}),)
    messages = render.messages(conversation, tasks, EN, {})
    everything = (
        _markup(messages)
        + render.sidebar([ConversationSummary(EVIL, EVIL)], EVIL, EN)
        + render.topbar(EVIL, EN)
        + render.welcome(tasks, EN)
        + render.beacon(conversation, EN, EVIL)
        + render.notice(EVIL, EN)
    )
    assert "<img" not in everything
    assert [part["text"] for part in messages[1]["content"] if part["type"] == "text"] == [EVIL]


def test_every_turn_is_two_messages_whatever_became_of_it() -> None:
    turns = tuple(
        Turn(f"t{number}", "question", variants=variants)
        for number, variants in enumerate(
            [(), (Variant("r", "", state="running"),), (Variant("r", "x", state="stopped"),), (Variant("r", "x"),)]
        )
    )
    roles = [message["role"] for message in render.messages(Conversation("c", turns=turns), TASKS, EN, {})]
    assert roles == ["user", "assistant"] * 4


def test_chip_names_task_and_certainty_in_the_pages_language_and_offers_the_others() -> None:
    conversation = Conversation("c", turns=(Turn("t", "q", variants=(Variant("r", "x", "translate", ROUTE),)),))
    markup = _markup(render.messages(conversation, TASKS, ZH, {}))
    assert "翻译 · 97 %" in markup
    assert 'data-ob="route" data-task="qa"' in markup
    assert "Translate · 97 %" in _markup(render.messages(conversation, TASKS, EN, {}))


def test_no_task_is_ever_shown_as_fully_certain() -> None:
    route = replace(ROUTE, probabilities={"translate": 0.998, "qa": 0.002})
    conversation = Conversation("c", turns=(Turn("t", "q", variants=(Variant("r", "x", "translate", route),)),))
    markup = _markup(render.messages(conversation, TASKS, EN, {}))
    assert "Translate · &gt; 99 %" in markup
    assert "Translate<span>&gt; 99 %</span>" in markup
    assert "Answer<span>0 %</span>" in markup


def test_words_that_decided_are_marked_in_what_the_user_wrote() -> None:
    text = "Please translate <b>this</b> into French, thanks"
    cues = (Cue("French", 34, 40, 0.4), Cue("translate", 7, 16, 0.9))
    route = replace(ROUTE, cues=cues)
    conversation = Conversation("c", turns=(Turn("t", text, variants=(Variant("r", "x", "translate", route),)),))
    markup = _markup(render.messages(conversation, TASKS, EN, {}))
    assert "Please <mark>translate</mark> &lt;b&gt;this&lt;/b&gt; into <mark>French</mark>, thanks" in markup


def test_unsure_router_asks_back_with_buttons_of_the_likeliest_other_tasks() -> None:
    for ask in (True, False):
        route = replace(ROUTE, ask=ask, probabilities={"translate": 0.5, "qa": 0.4})
        conversation = Conversation("c", turns=(Turn("t", "q", variants=(Variant("r", "x", "translate", route),)),))
        markup = _markup(render.messages(conversation, TASKS, ZH, {}))
        assert ("或者你是想" in markup) is ask
        assert markup.count('data-ob="route" data-task="qa"') == (2 if ask else 1)


def test_variant_picked_with_the_arrows_is_shown_instead_of_the_last() -> None:
    turn = Turn("t", "q", variants=(Variant("r1", "first"), Variant("r2", "second")), chosen=1)
    conversation = Conversation("c", turns=(turn,))

    def shown(picked: dict[str, int]) -> list[str]:
        parts = render.messages(conversation, TASKS, EN, picked)[1]["content"]
        return [part["text"] for part in parts if part["type"] == "text"]

    assert shown({}) == ["second"]
    assert shown({"t": 0}) == ["first"]
    assert shown({"t": 7}) == ["second"]


def test_each_error_code_has_words_for_people_in_both_languages() -> None:
    for code in ("overloaded", "context_length_exceeded", "engine_failed", "timeout", "conflict", "never_heard_of"):
        for words in (EN, ZH):
            assert len(render.friendly(code, words)) > 15


@pytest.mark.parametrize("words", [EN, ZH])
def test_stopped_reply_carries_its_receipt(words: Strings) -> None:
    def note(receipt: Stopped | None) -> str:
        variant = Variant("r", "x", state="stopped", receipt=receipt)
        conversation = Conversation("c", turns=(Turn("t", "q", variants=(variant,)),))
        return _markup(render.messages(conversation, TASKS, words, {}))

    assert words.stopped_receipt.format(tokens=12, ms=35) in note(Stopped(12, 88, 34.6))
    assert words.stopped_after.format(tokens=12) in note(Stopped(12, 88))
    assert words.stopped in note(None)


def test_reply_that_is_being_written_is_shown_as_such_and_found_by_the_script() -> None:
    running = Conversation("c", turns=(Turn("t", "q", variants=(Variant("r", "", state="running"),)),))
    markup = _markup(render.messages(running, TASKS, EN, {}))
    assert 'data-c="c"' in markup
    assert EN.thinking in markup
    assert 'data-state="running"' in render.beacon(running, EN)
    assert 'data-state="idle"' in render.beacon(running, EN, over=True)


@pytest.mark.parametrize(
    ("words", "queued", "shown"),
    [
        (EN, Queued(3, 7.6), "Waiting: place 3, about 8 s"),
        (EN, Queued(3), "Waiting: place 3"),
        (EN, Queued(1, 0.1), "Waiting: place 1, about 1 s"),
        (ZH, Queued(3, 7.6), "排队中：第 3 位，约 8 秒"),
        (ZH, Queued(3), "排队中：第 3 位"),
    ],
)
def test_reply_that_waits_for_an_engine_says_where_it_stands(words: Strings, queued: Queued, shown: str) -> None:
    conversation = Conversation("c", turns=(Turn("t", "q", variants=(Variant("r", "", state="running"),)),))
    live = Update(conversation, running=True, queued=queued)
    assert f"<span>{shown}</span>" in _markup(render.messages(conversation, TASKS, words, {}, live))
