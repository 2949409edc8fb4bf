"""What each built-in task asks of the engine and gives to the user, over a scripted context."""

import re
from collections.abc import Sequence

import pytest

from onebox.errors import EngineFailed
from onebox.events import Check, Citation, Progress, TextDelta
from onebox.messages import Message, assistant, system, user
from onebox.plugin import Plugin, Sampling
from onebox.settings import read_settings
from onebox.testing import ScriptedContext, check_replay, collect, text_of
from plugins.chat import Chat
from plugins.qa import QA, find_question
from plugins.reason import Reason
from plugins.registry import load_plugins
from plugins.summarize import Summarize
from plugins.translate import Translate
from plugins.translation_request import split_translation
from plugins.write import Write

LONG = "\n\n".join(
    f"Chapter {number}. Ship {number} left port {number} at dawn and met a storm." for number in range(300)
)
PLUGINS = load_plugins(read_settings().plugins)


def last(ctx: ScriptedContext) -> Sequence[Message]:
    return ctx.calls[-1].messages


@pytest.mark.parametrize("name", list(PLUGINS))
async def test_each_example_gets_one_streamed_reply(name: str) -> None:
    plugin = PLUGINS[name]
    for example in plugin.examples:
        if plugin.name == "chat" and example.text in ("Hi! What can you do?", "你好！你能做什么？"):
            continue
        events = await check_replay(plugin, example.text, replies=["Fine. 好。"])
        assert text_of(events) == "Fine. 好。"
        assert sum(isinstance(event, TextDelta) for event in events) > 1


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
async def test_prompt_speaks_the_language_of_the_user(plugin: Plugin) -> None:
    for lang, han in (("zh", True), ("en", False)):
        ctx = ScriptedContext(["好"])
        await collect(plugin, [each.text for each in plugin.examples if each.lang == lang][1], ctx=ctx)
        assert bool(re.search(r"[\u4e00-\u9fff]", last(ctx)[0].text)) == han


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
async def test_short_conversation_is_never_counted(plugin: Plugin) -> None:
    ctx = ScriptedContext(["Yes."])
    await collect(plugin, plugin.examples[1].text, before=[user("Hi"), assistant("Hello!")], ctx=ctx)
    assert ctx.llm.counts == 0


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
async def test_caller_s_sampling_wins_over_the_task_s(plugin: Plugin) -> None:
    ctx = ScriptedContext(["Yes.", "Yes."])
    await collect(plugin, plugin.examples[1].text, sampling=Sampling(max_tokens=7, temperature=1.5, seed=3), ctx=ctx)
    await collect(plugin, plugin.examples[1].text, ctx=ctx)
    asked, unasked = (call.sampling for call in ctx.calls)
    assert (asked.max_tokens, asked.temperature, asked.seed) == (7, 1.5, 3)
    assert unasked.max_tokens is None
    assert unasked.temperature == (0.7 if plugin.name in ("chat", "write") else 0.0)


@pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)
async def test_engine_s_failure_passes_through(plugin: Plugin) -> None:
    with pytest.raises(EngineFailed, match="gone"):
        await collect(plugin, plugin.examples[1].text, replies=[EngineFailed("gone")])


# chat, write


async def test_conversation_is_sent_oldest_first_behind_one_system_text() -> None:
    ctx = ScriptedContext(["Your name is Ann."])
    before = [system("Be terse."), user("I am Ann."), assistant("Hi Ann!")]
    await collect(Chat(), "What is my name?", before=before, ctx=ctx)
    assert [message.role for message in last(ctx)] == ["system", "user", "assistant", "user"]
    assert last(ctx)[0].text.endswith("Be terse.")


async def test_long_conversation_keeps_its_newest_turns() -> None:
    before = [
        message for turn in range(60) for message in (user(f"question {turn} " * 20), assistant(f"reply {turn} " * 20))
    ]
    ctx = ScriptedContext(["Fine."], context_length=2048)
    await collect(Chat(), "And now?", before=before, ctx=ctx)
    sent = last(ctx)
    assert await ctx.llm.count_tokens(sent) <= 2048 * 3 // 4
    assert sent[0].role == "system"
    assert sent[1].role == "user"
    assert list(sent[1:]) == [*before, user("And now?")][-len(sent) + 1 :]
    assert len(sent) > 8
    assert ctx.llm.counts <= 3


async def test_few_long_turns_lose_no_more_than_they_must() -> None:
    before = [
        message for turn in range(4) for message in (user(f"question {turn} " * 60), assistant(f"reply {turn} " * 60))
    ]
    ctx = ScriptedContext(["Fine."], context_length=2048)
    await collect(Chat(), "And now?", before=before, ctx=ctx)
    assert list(last(ctx)[1:]) == [*before[2:], user("And now?")]


async def test_draft_follows_its_options() -> None:
    ctx = ScriptedContext(["Sehr geehrte Frau Kurz,"])
    params = {"tone": "formal", "words": 80, "language": "de"}
    await collect(Write(), "Write to my landlady.", params=params, ctx=ctx)
    assert last(ctx)[-1].text == "Write to my landlady.\nTone: formal. Length: about 80 words. Write in German."


# summarize


async def test_text_that_fits_is_summarized_in_one_call() -> None:
    ctx = ScriptedContext(["Short."])
    events = await collect(Summarize(), "Summarize in one sentence:\n\n" + LONG[:600], ctx=ctx)
    assert text_of(events) == "Short."
    assert [call.kind for call in ctx.calls] == ["stream"]
    assert "Summarize in one sentence" in last(ctx)[-1].text


async def test_long_text_is_read_in_parts_with_progress_and_merged() -> None:
    seen: list[str] = []

    def part(messages: Sequence[Message]) -> str:
        seen.append(messages[-1].text)
        return f"Part {len(seen)} said."

    replies = [part] * 30
    ctx = ScriptedContext(replies, context_length=2048)
    events = await collect(Summarize(), "Please summarize:\n" + LONG, ctx=ctx)
    progress = [event for event in events if isinstance(event, Progress)]
    kinds = [call.kind for call in ctx.calls]
    assert kinds == ["complete"] * (len(kinds) - 1) + ["stream"]
    assert [event.done for event in progress] == list(range(len(kinds)))
    assert all(any(f"Ship {number} left" in text for text in seen) for number in range(300))
    assert "Part 1 said.\n\nPart 2 said." in last(ctx)[-1].text
    for call in ctx.calls:
        assert await ctx.llm.count_tokens(call.messages) <= 2048 * 3 // 4


async def test_summaries_too_long_for_one_prompt_are_summarized_again() -> None:
    ctx = ScriptedContext(["A sentence of a summary. " * 12] * 80, context_length=1024)
    events = await collect(Summarize(), "总结：" + "今天天气很好，我们去公园散步。" * 700, ctx=ctx)
    totals = sorted({event.total for event in events if isinstance(event, Progress)})
    assert len(totals) >= 2
    assert ctx.calls[-1].kind == "stream"
    assert await ctx.llm.count_tokens(last(ctx)) <= 768


async def test_long_summary_replays() -> None:
    await check_replay(Summarize(), "Summarize:\n" + LONG, replies=["Yes."] * 30, context_length=2048)


async def test_failing_part_ends_the_summary() -> None:
    ctx = ScriptedContext(["Yes.", EngineFailed("gone"), *["Yes."] * 30], context_length=2048)
    with pytest.raises(EngineFailed, match="gone"):
        await collect(Summarize(), "Summarize:\n" + LONG, ctx=ctx)


@pytest.mark.parametrize(
    ("text", "words"), [("Please summarize this text.", "Paste"), ("帮我总结一下这篇文章", "粘贴")]
)
async def test_summary_of_nothing_asks_for_a_text_without_the_engine(text: str, words: str) -> None:
    ctx = ScriptedContext()
    assert words in text_of(await collect(Summarize(), text, ctx=ctx))
    assert ctx.calls == []


async def test_summary_without_a_text_takes_the_one_before() -> None:
    ctx = ScriptedContext(["Short."])
    before = [user("Tell me about bees."), assistant("Bees pollinate flowers and live in hives of thousands.")]
    await collect(Summarize(), "Summarize that in one sentence", before=before, ctx=ctx)
    assert "hives of thousands" in last(ctx)[-1].text


async def test_summary_of_a_topic_goes_to_the_engine_as_it_is() -> None:
    ctx = ScriptedContext(["A prince dithers."])
    await collect(Summarize(), "Summarize the plot of Hamlet", ctx=ctx)
    assert last(ctx)[-1].text == "Summarize the plot of Hamlet"


async def test_summary_follows_its_options() -> None:
    ctx = ScriptedContext(["- 一"])
    params = {"words": 50, "format": "bullets", "language": "zh"}
    await collect(Summarize(), "Bees pollinate flowers. They live in hives.", params=params, ctx=ctx)
    asked = last(ctx)[-1].text
    assert all(words in asked for words in ("about 50 words", "one point per line", "Write in Chinese"))


# translate


@pytest.mark.parametrize(
    ("text", "payload"),
    [
        ("Translate into French: Good morning", "Good morning"),
        ("Translate 'Note: wet paint' to German", "Note: wet paint"),
        ("translate I love you into Spanish", "I love you"),
        ("Please translate from English to Chinese:\nTime flies.", "Time flies."),
        ("How do you say good night in Italian?", "good night"),
        ("把我爱你翻译成英文", "我爱你"),
        ("把“早上好”翻译成法语。", "早上好"),
        ("翻译成英文 我爱你", "我爱你"),
        ("翻译 hello world", "hello world"),
        ("我爱你用日语怎么说？", "我爱你"),
        ("英语怎么说你好", "你好"),
        ("我爱你，翻译成韩语", "我爱你"),
        ("French: good morning", "good morning"),
        ("Guten Morgen, wie geht es Ihnen?", "Guten Morgen, wie geht es Ihnen?"),
        ("第一行\n第二行\n\n请翻译成英文", "第一行\n第二行"),
        ("Translate this into French", ""),
        ("翻译一下上面这段话", ""),
        ("翻译成日语", ""),
        (
            "See https://example.org:80/a and translate it to French",
            "See https://example.org:80/a and translate it to French",
        ),
    ],
)
def test_text_to_translate_is_told_from_the_instruction(text: str, payload: str) -> None:
    if "https" in text:
        assert "example.org:80/a" in split_translation(text).payload + split_translation(text).instruction
    else:
        assert split_translation(text).payload == payload


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ("翻译：今天很好", "把下面的中文翻译成英语："),
        ("Translate: The weather is nice today", "Translate from English into Chinese:"),
        ("Translate: Le chat est sur la table", "Translate from French into English:"),
        ("翻译成法语：今天很好", "把下面的中文翻译成法语："),
        ("auf Deutsch: The weather is nice today", "Translate from English into German:"),
    ],
)
async def test_languages_are_detected_and_read_from_the_request(text: str, ask: str) -> None:
    ctx = ScriptedContext(["ok"])
    await collect(Translate(), text, ctx=ctx)
    assert last(ctx)[-1].text.startswith(ask)


async def test_translation_keeps_code_lists_headings_and_blank_lines_to_the_byte() -> None:
    text = (
        "# Setup\n\nRun the program.\n\n```sh\nmake up  # start\n```\n\n- first point\n- second point\n\n1. one more\n"
    )
    ctx = ScriptedContext([lambda messages: messages[-1].text.split("\n\n")[-1].upper()] * 9)
    events = await collect(Translate(), "Translate into French:\n" + text, ctx=ctx)
    assert text_of(events) == (
        "# SETUP\n\nRUN THE PROGRAM.\n\n```sh\nmake up  # start\n```\n\n- FIRST POINT\n- SECOND POINT\n\n1. ONE MORE"
    )
    assert not any("make up" in call.prompt for call in ctx.calls)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == list(range(6))


async def test_lost_placeholders_are_put_back() -> None:
    ctx = ScriptedContext(["Bonjour nom, voyez ici.", "Bonjour", ", voyez", "maintenant."])
    events = await collect(Translate(), "Translate into French: Hello {name}, see https://x.org/a?b=1 now.", ctx=ctx)
    assert "{name}" in text_of(events)
    assert "https://x.org/a?b=1" in text_of(events)
    assert [event for event in events if isinstance(event, Check)] == [Check("kept", True)]


async def test_kept_placeholders_cost_one_call() -> None:
    ctx = ScriptedContext(["Bonjour {name} !"])
    events = await collect(Translate(), "Translate into French: Hello {name}!", ctx=ctx)
    assert text_of(events) == "Bonjour {name} !"
    assert len(ctx.calls) == 1


async def test_long_prose_is_translated_in_pieces_that_join() -> None:
    prose = "The ship left port at dawn. " * 150
    ctx = ScriptedContext([lambda messages: messages[-1].text.split("\n\n")[-1]] * 9)
    events = await collect(Translate(), "Translate into German:\n" + prose, ctx=ctx)
    assert text_of(events) == prose.strip()
    assert 3 <= len(ctx.calls) <= 5


async def test_follow_up_translates_the_reply_before() -> None:
    ctx = ScriptedContext(["Les abeilles"])
    before = [user("Tell me about bees."), assistant("Bees pollinate flowers and live in hives of thousands.")]
    await collect(Translate(), "Translate that into French", before=before, ctx=ctx)
    assert last(ctx)[-1].text == (
        "Translate from English into French:\n\nBees pollinate flowers and live in hives of thousands."
    )


async def test_translation_of_nothing_asks_for_a_text_without_the_engine() -> None:
    assert "no text to translate" in text_of(await collect(Translate(), "Translate this into French"))
    assert "没有要翻译" in text_of(await collect(Translate(), "翻译成法语"))


async def test_wishes_beyond_the_language_reach_the_model() -> None:
    ctx = ScriptedContext(["Guten Tag"])
    await collect(Translate(), "Translate into German, use simple vocabulary: Good day to everybody", ctx=ctx)
    assert "use simple vocabulary" in last(ctx)[-1].text


# qa


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (f"{LONG[:400]}\n\nWhich ship met a storm?", "Which ship met a storm?"),
        (f"Which ship met a storm?\n\n{LONG[:400]}", "Which ship met a storm?"),
        (f"Text: {LONG[:400]}\nQuestion: Which ship?", "Which ship?"),
        (f"问题：哪条船？\n原文：{'船在清晨离港。' * 20}", "哪条船？"),
        ("船在清晨离港，随后遇到风暴。" * 8 + "哪条船遇到风暴？", "哪条船遇到风暴？"),
    ],
)
def test_question_is_told_from_its_text(text: str, question: str) -> None:
    found = find_question(text)
    assert found.question == question
    assert found.text
    assert text[found.start :].startswith(found.text)


def test_question_alone_has_no_text() -> None:
    assert find_question("I have a cat. Why does it purr?").text == ""


async def test_answer_from_a_text_cites_the_sentence_that_carries_it() -> None:
    text = (
        "The Golden Gate Bridge opened in 1937 after four years. It is 2.7 km long and spans the strait. "
        "Its colour is called international orange.\n\nHow long is the bridge?"
    )
    events = await collect(QA(), text, replies=["It is 2.7 km long."])
    (citation,) = [event for event in events if isinstance(event, Citation)]
    assert citation.quote == "It is 2.7 km long and spans the strait."
    assert text[citation.start : citation.end] == citation.quote
    assert citation.source == "messages[0]"


async def test_answer_that_the_text_lacks_cites_nothing() -> None:
    events = await collect(QA(), QA.examples[2].text, replies=["Nobody knows."])
    assert not any(isinstance(event, Citation) for event in events)


async def test_text_beyond_the_context_is_searched() -> None:
    text = LONG + "\n\nThe treasure lies under the old lighthouse of Marenholm.\n\n" + LONG
    ctx = ScriptedContext(["It lies under the old lighthouse of Marenholm."], context_length=2048)
    message = f"{text}\n\nWhere does the treasure lie, under which lighthouse?"
    events = await collect(QA(), message, ctx=ctx)
    assert "lighthouse of Marenholm" in last(ctx)[-1].text
    assert await ctx.llm.count_tokens(last(ctx)) <= 1536
    citation = next(event for event in events if isinstance(event, Citation))
    assert message[citation.start : citation.end] == citation.quote
    assert "Marenholm" in citation.quote


async def test_follow_up_to_a_long_text_searches_it_again() -> None:
    text = LONG + "\n\nThe treasure lies under the old lighthouse of Marenholm."
    ctx = ScriptedContext(["Under the lighthouse."], context_length=2048)
    before = [user(text), assistant("What a story.")]
    await collect(QA(), "Where is the treasure, which lighthouse?", before=before, ctx=ctx)
    assert "Marenholm" in last(ctx)[-1].text


# reason


async def test_equations_of_the_reply_are_checked() -> None:
    events = await collect(Reason(), "Tom has 15 apples ...", replies=["15 - 6 = 9\n9 + 8 = 18\nAnswer: 18"])
    assert [event for event in events if isinstance(event, Check)] == [
        Check("arithmetic", True, "15 - 6 = 9"),
        Check("arithmetic", False, "9 + 8 = 17, not 18"),
    ]


async def test_sum_of_the_question_is_computed_for_the_model() -> None:
    ctx = ScriptedContext(["1788"])
    await collect(Reason(), "What is 37 * 48 + 12?", ctx=ctx)
    assert last(ctx)[-1].text.endswith("37 * 48 + 12 = 1788)")


async def test_checks_can_be_left_out() -> None:
    events = await collect(Reason(), "2+2?", params={"check": False}, replies=["2 + 2 = 5"])
    assert not any(isinstance(event, Check) for event in events)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("What's the weather in Berlin today?", "without internet or live data"),
        ("what time is it?", "without internet or live data"),
        ("Remind me to call Bob at six", "only write text"),
        ("Please send an email to my boss", "only write text"),
        ("Hi! What can you do?", "I pick the kind of work myself"),
        ("北京今天天气怎么样？", "没有实时数据"),
        ("帮我订一张去上海的机票", "办不到"),
        ("你会什么？你是谁？", "我会自己判断"),
    ],
)
async def test_message_beyond_the_box_is_answered_honestly_without_the_engine(text: str, fact: str) -> None:
    ctx = ScriptedContext()
    assert fact in text_of(await collect(Chat(), text, ctx=ctx))
    assert ctx.calls == []


async def test_longer_message_beyond_the_box_carries_the_fact_to_the_engine() -> None:
    ctx = ScriptedContext(["Sorry."])
    text = "I had a long day at work and would like to go for a walk with the dog. What's the weather in Berlin today?"
    await collect(Chat(), text, ctx=ctx)
    assert "no live data" in last(ctx)[-1].text


@pytest.mark.parametrize("text", ["Hello there", "我今天有点累", "I set the table", "书里的天气描写很美"])
async def test_small_talk_is_sent_as_it_is(text: str) -> None:
    ctx = ScriptedContext(["Nice."])
    await collect(Chat(), text, ctx=ctx)
    assert last(ctx)[-1].text == text
