"""The router: what it decides and how it says why."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from langchain_core.decisions import Choice, Noul
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda

from agents.command import split_command
from agents.encoder import Encoder
from agents.instruction import normalize, split_instruction
from agents.labelled import GOLDEN, GOLDEN_PLANS, HELD_OUT, read_labelled
from agents.reader.plans import TASKS
from agents.reader.reader import shared_reader
from agents.router import Router
from agents.scoring import Judged
from agents.steps import request_of
from onebox.errors import Unavailable
from onebox.events import Event, TextDelta
from onebox.messages import Message, assistant, user
from onebox.plugin import Chosen, Completion, Context, Example, Lang, Plugin, Sampling, Task
from onebox.settings import Settings

NEWS = (
    "The ferry to the northern islands will stop running in November, the county said on Monday. Repairs to the pier "
    "cost more than planned and the company has lost two captains. Islanders fear a winter without fresh food. "
    "A smaller boat may serve the route twice a week until the spring."
)
PLAIN = (
    (f"Summarise this in two lines: {NEWS}", "summarize"),
    (f"{NEWS}\n\ntl;dr", "summarize"),
    (f"{NEWS}\n翻译成中文", "translate"),
    (f"{NEWS}\n\nHow often will the smaller boat run?", "qa"),
    (f"{NEWS}\n给这段新闻起个标题", "write"),
    ("这句话用日语怎么说：我明天到", "translate"),
    ("为什么夏天白天长？", "qa"),
    ("一本书240页，小明每天读30页，几天读完？", "reason"),
    ("帮我写一封给房东的信", "write"),
    ("你好呀", "chat"),
    ("帮我订一张去成都的机票", "chat"),
    ("what does 'translate' mean in geometry?", "qa"),
    ("write a poem about a translator", "write"),
    ("summarise how photosynthesis works", "qa"),
    ('Translate "write me a poem" into Italian', "translate"),
    ("Écris un poème sur la mer", "write"),
    ("Wie viel sind 15 % von 80?", "reason"),
    ("なぜ海は青いの？", "qa"),
)
IMPOSSIBLE = (
    "Set an alarm for half past six",
    "帮我订两张明天去南京的高铁票",
    "今天北京的天气怎么样",
    "Réserve-moi une table pour ce soir",
    "Enciende la luz del salón",
    "Spiel das neue Album von Muse ab",
    "明日の朝7時に起こして",
    "엄마한테 전화 걸어줘",
    "Включи кондиционер",
    "Compre duas passagens para Recife",
    "شغل الموسيقى",
)
POSSIBLE = (
    "How does an alarm clock work?",
    "写一条短信取消明天的预订",
    "为什么天气预报有时不准",
    "Écris un message pour réserver une table",
    "Wie funktioniert eine Klimaanlage?",
    "thanks a lot!",
)


class Engine:
    """An engine that always prefers one option, or fails."""

    def __init__(self, favourite: str | None) -> None:
        self.favourite = favourite
        self.asked: list[Sequence[str]] = []

    @property
    def context_length(self) -> int:
        return 4096

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncIterator[TextDelta]:
        raise AssertionError("the router streams nothing")

    async def complete(self, messages: Sequence[Message], sampling: Sampling) -> Completion:
        raise AssertionError("the router completes nothing")

    async def choose(self, messages: Sequence[Message], options: Sequence[str]) -> Chosen:
        self.asked.append(options)
        if self.favourite is None:
            raise Unavailable("The engine is not there.")
        rest = 0.02 / (len(options) - 1)
        return Chosen(self.favourite, {name: 0.98 if name == self.favourite else rest for name in options})

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        return 0


class Rhyme(Plugin):
    name = "rhyme"
    version = "1"
    title: ClassVar[Mapping[Lang, str]] = {"en": "Rhyme", "zh": "押韵"}
    summary: ClassVar[Mapping[Lang, str]] = {"en": "Finds rhyming words", "zh": "找押韵的词"}
    examples = (Example("en", "find words that rhyme with orange"), Example("zh", "找几个和“光”押韵的字"))
    counter_examples = (Example("en", "write a rhyming poem about an orange"),)

    async def run(self, task: Task, ctx: Context) -> AsyncIterator[Event]:
        yield TextDelta("range")


def plugins(*extra: Plugin) -> Mapping[str, Plugin]:
    found = {point.name: point.load()() for point in entry_points(group="onebox.plugins") if point.name in TASKS}
    return found | {plugin.name: plugin for plugin in extra}


@pytest.fixture(scope="module")
def router() -> Router:
    return Router()


async def test_router_picks_the_task_the_message_asks_for(router: Router) -> None:
    """Nearly always: on another processor other messages are told wrong."""
    wrong = []
    for text, task in PLAIN:
        decision = await router.route([user(text)])
        assert decision.tier == "head"
        assert sum(decision.probabilities.values()) == pytest.approx(1.0)
        wrong += [(text, task, decision.task)] * (decision.task != task)
    assert len(wrong) <= len(PLAIN) // 8, wrong


@pytest.mark.parametrize(
    ("earlier", "task"),
    [
        ([user(f"总结一下：{NEWS}"), assistant("北方群岛的渡轮十一月停航。")], "summarize"),
        ([user("写一封辞职信"), assistant("尊敬的领导：……")], "write"),
    ],
)
async def test_follow_up_takes_the_task_of_the_turn_before(router: Router, earlier: list[Message], task: str) -> None:
    assert (await router.route([*earlier, user("再短一点")])).task == task


async def test_and_in_spanish_after_a_translation_is_a_translation(router: Router) -> None:
    talk = [user("How do you say cheese in French?"), assistant("Fromage."), user("and in Spanish?")]
    assert (await router.route(talk)).task == "translate"


async def test_explicit_task_wins_over_the_text(router: Router) -> None:
    decision = await router.route([user("write a poem")], explicit="translate")
    assert (decision.task, decision.plan, decision.tier) == ("translate", ("translate",), "explicit")
    assert decision.probabilities["translate"] == 1.0


async def test_slash_command_is_an_explicit_choice(router: Router) -> None:
    assert (await router.route([user("/reason is this a poem?")])).task == "reason"
    assert (await router.route([user("/unknown write a poem")])).tier != "explicit"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/translate good night", ("translate", "good night")),
        (" /translate\nHello world\n", ("translate", "Hello world")),
        ("/translate", ("translate", "")),
        ("/translated good night", None),
        ("say /translate", None),
    ],
)
def test_command_is_told_from_the_rest_of_the_message(text: str, found: tuple[str, str] | None) -> None:
    assert split_command(text, TASKS) == found


async def test_message_without_words_goes_to_chat(router: Router) -> None:
    decision = await router.route([user("  \n ")])
    assert (decision.task, decision.tier) == ("chat", "default")


@pytest.mark.parametrize("text", ["😀", "。。。", "— …", "!"])
async def test_message_of_signs_alone_is_routed_without_a_cue(router: Router, text: str) -> None:
    routed = await router.route([user(text)])
    assert (routed.task in TASKS, routed.cues) == (True, ())


async def test_cues_are_spans_of_the_text(router: Router) -> None:
    text = f"{NEWS}\nPlease translate all of it into Chinese"
    decision = await router.route([user(text)])
    assert decision.cues
    assert all(text[cue.start : cue.end] == cue.text and cue.weight > 0 for cue in decision.cues)
    assert any("translate" in cue.text.lower() or "Chinese" in cue.text for cue in decision.cues)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        (f"Summarise this and put it into French: {NEWS}", ("summarize", "translate")),
        (f"先翻译成中文再告诉我谁赢了：{NEWS}", ("translate", "qa")),
        ("translate this and tell me how many apples are left: 小明有12个苹果，吃了5个。", ("translate", "reason")),
        (f"Translate this into German and keep the tone: {NEWS}", ("translate",)),
        ('translate "summarise this and translate it" into French', ("translate",)),
        ("Write an email to my boss and explain why I was late", ("write",)),
    ],
)
async def test_two_things_in_a_row_are_a_plan_and_decoys_are_not(
    router: Router, text: str, plan: tuple[str, ...]
) -> None:
    decision = await router.route([user(text)])
    assert decision.plan == plan
    assert decision.task == plan[0]
    assert [step.task for step in decision.steps] == list(plan if len(plan) > 1 else ())
    assert all(step.words and step.words in text for step in decision.steps)


async def test_text_behind_a_colon_is_what_the_first_step_works_on(router: Router) -> None:
    for text in (
        "先翻译成中文再告诉我谁赢了：The Lions beat the Bears 3-1.",
        f"Summarise this and put it into French: {NEWS}",
    ):
        steps = (await router.route([user(text)])).steps
        assert text[-20:] in request_of(steps, 0, text, "")
        assert text[-20:] not in steps[1].words


async def test_what_cannot_be_done_is_declined_and_what_sounds_like_it_is_not(router: Router) -> None:
    done = {text: await router.route([user(text)]) for text in (*IMPOSSIBLE, *POSSIBLE)}
    kept = [text for text in IMPOSSIBLE if (done[text].task, done[text].declined) != ("chat", True)]
    lost = [text for text in POSSIBLE if done[text].declined]
    assert len(kept) <= 1, kept
    assert lost == []


async def test_unseen_messages_are_declined_and_answered_as_they_should_be(router: Router) -> None:
    items = [item for item in read_labelled([HELD_OUT]) if item.unsupported is not None]
    declined = [(await router.route(item.messages)).declined for item in items]
    wrongly = [said for said, item in zip(declined, items, strict=True) if not item.unsupported]
    assert np.mean(wrongly) <= 0.02


async def test_decisions_on_unseen_messages_are_right_and_know_how_sure_they_may_be(router: Router) -> None:
    items = read_labelled([HELD_OUT])
    judged = Judged.of([item.task for item in items], [(await router.route(i.messages)).probabilities for i in items])
    assert judged.accuracy() >= 0.8
    assert judged.at_coverage(0.8)[0] >= 0.88
    assert judged.calibration_error() <= 0.08


async def test_plans_of_unseen_messages_are_found_and_decoys_kept_single(router: Router) -> None:
    items = read_labelled([GOLDEN_PLANS])
    plans = [(await router.route(item.messages)).plan for item in items]
    several = [plan == item.plan for plan, item in zip(plans, items, strict=True) if len(item.plan) > 1]
    single = [len(plan) == 1 for plan, item in zip(plans, items, strict=True) if len(item.plan) == 1]
    assert sum(several) >= 0.6 * len(several)
    assert sum(single) >= 0.8 * len(single)


async def test_engine_is_asked_only_when_the_head_is_unsure(tmp_path: Path) -> None:
    sure = Router.load(plugins(), Settings(home=tmp_path, router_threshold=0.0, router_engine=True))
    unsure = Router.load(plugins(), Settings(home=tmp_path, router_threshold=1.0, router_engine=True))
    off = Router.load(plugins(), Settings(home=tmp_path, router_threshold=1.0, router_engine=False))
    engine = Engine("reason")
    assert (await sure.route([user("写一首诗")], llm=engine)).tier == "head"
    assert (await off.route([user("写一首诗")], llm=engine)).tier == "head"
    assert engine.asked == []
    decision = await unsure.route([user("写一首诗")], llm=engine)
    assert (decision.task, decision.tier, decision.ask) == ("write", "engine", True)
    assert engine.asked == [sorted(TASKS)]


async def test_engine_tips_whether_a_message_asks_for_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = ("summarize", "translate")
    reading = shared_reader().read([user("Summarise it and translate it")])
    sure = np.array([0.9, 0.02, 0.02, 0.02, 0.02, 0.02], np.float32)
    router = Router.load(plugins(), Settings(home=tmp_path, router_engine=True))
    for several, favourite, plan in (
        (0.55, "one", ("summarize",)),
        (0.45, "several", chain),
        (0.9, "one", chain),
    ):
        found = replace(reading, probabilities=sure, plan=chain, chain=chain, several=several)
        monkeypatch.setattr("agents.router.shared_reader", lambda found=found: SimpleNamespace(read=lambda _: found))
        assert (await router.route([user("Summarise it and translate it")], llm=Engine(favourite))).plan == plan


async def test_engine_that_fails_leaves_the_decision_to_the_head(tmp_path: Path) -> None:
    router = Router.load(plugins(), Settings(home=tmp_path, router_threshold=1.0, router_engine=True))
    decision = await router.route([user("写一首诗")], llm=Engine(None))
    assert (decision.task, decision.tier, decision.ask) == ("write", "head", True)


async def test_third_party_plugin_joins_through_its_examples(tmp_path: Path) -> None:
    router = Router.load(plugins(Rhyme()), Settings(home=tmp_path))
    assert (await router.route([user("find words that rhyme with silver")])).task == "rhyme"
    assert (await router.route([user("write a rhyming poem about a silver spoon")])).task == "write"
    assert (await router.route([user("为什么海水是咸的")])).task == "qa"


class Greedy(Rhyme):
    name = "greedy"
    examples = tuple(Example("en", item.messages[-1].text) for item in read_labelled([GOLDEN]) if item.lang == "en")
    counter_examples = ()


async def test_plugin_that_would_take_other_tasks_messages_is_refused_with_a_reason(tmp_path: Path) -> None:
    router = Router.load(plugins(Rhyme(), Greedy()), Settings(home=tmp_path))
    assert (await router.route([user("find words that rhyme with silver")])).task == "rhyme"
    assert set(router.refused) == {"greedy"}
    assert "counter-examples" in router.refused["greedy"]
    asked = read_labelled([GOLDEN])[200]
    assert (await router.route(asked.messages)).task != "greedy"


async def test_task_that_is_not_loaded_is_never_chosen(tmp_path: Path) -> None:
    router = Router.load(
        {name: plugin for name, plugin in plugins().items() if name != "write"}, Settings(home=tmp_path)
    )
    decision = await router.route([user("write a poem")])
    assert "write" not in decision.probabilities
    assert decision.task != "write"


def test_router_answers_choice_questions_in_a_langchain_program(router: Router) -> None:
    chain = RunnableLambda(
        lambda text: {
            "state": [HumanMessage("hi"), AIMessage("hello"), HumanMessage(text)],
            "questions": {"task": Choice(instructions="Which task?", criteria={"write": "", "reason": "", "chat": ""})},
        }
    )
    answer = (chain | router).invoke("solve 3x + 7 = 22").choices["task"]
    assert answer.choice == "reason"
    assert set(answer.probabilities) == {"write", "reason", "chat"}
    assert answer.confidence == pytest.approx(answer.probabilities["reason"])


def test_router_refuses_questions_it_cannot_answer(router: Router) -> None:
    with pytest.raises(ValueError, match="no tasks of this router"):
        router.invoke({"state": "hi", "questions": {"q": Choice(instructions="?", criteria={"poem": None})}})
    with pytest.raises(ValueError, match="Ask a Choice"):
        router.invoke({"state": "hi", "questions": {"q": Noul(instructions="?")}})


def test_instruction_is_found_before_and_after_a_pasted_text() -> None:
    for text in (f"Summarise this:\n{NEWS}", f"{NEWS}\nSummarise this:"):
        found = split_instruction(text)
        assert found.text == "summarise this:"
        assert all(text[s.start : s.end].lower() == s.text for s in found.segments)
    quoted = split_instruction('Translate "write me a poem" into Italian')
    assert "poem" not in quoted.text


@pytest.mark.timeout(60)  # minutes, where each beginning is followed to the end of the text
@pytest.mark.parametrize("piece", ["“", "„", "「", "«", "《", "```", "'a ", "-----\n", "a ⏎ "])
def test_what_never_ends_is_not_followed_from_each_beginning(piece: str) -> None:
    assert split_instruction(piece * (300_000 // len(piece))).segments


def test_blank_lines_of_any_kind_are_no_lines() -> None:
    text = f"{NEWS}\r\nwhat lands on whose doormat\r\n\u3000\r\n"
    assert "what lands on whose doormat" in split_instruction(text).text


def test_normalizing_keeps_the_length_of_any_text() -> None:
    for text in ("İSTANBUL", "請幫我翻譯", "ẞ", "予約して"):
        assert len(normalize(text)) == len(text)


def test_word_vectors_left_on_disk_give_the_same_embedding(tmp_path: Path) -> None:
    plain, lean = Encoder(), Encoder(tmp_path)
    texts = ["写一首诗", "sum it up"]
    assert np.array_equal(plain.embed(texts), lean.embed(texts))
    assert len(list(tmp_path.iterdir())) == 1


async def test_messages_routed_at_once_get_the_decisions_they_get_alone() -> None:
    router = Router()
    await router.warm()
    texts = [f"Translate into French: number {i}" if i % 2 else f"写一首关于第{i}个月的诗" for i in range(40)]
    alone = [await router.route([user(text)]) for text in texts]
    together = await asyncio.gather(*(router.route([user(text)]) for text in texts))
    for one, other in zip(alone, together, strict=True):
        assert (one.task, one.probabilities) == (other.task, other.probabilities)


async def test_a_caller_that_gives_up_does_not_spoil_the_decision_of_the_next() -> None:
    router = Router()
    await router.warm()
    given_up = asyncio.ensure_future(router.route([user("Translate into French: one")]))
    kept = asyncio.ensure_future(router.route([user("Translate into French: two")]))
    await asyncio.sleep(0)
    given_up.cancel()
    assert (await kept).task == "translate"
