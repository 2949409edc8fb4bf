"""The router agent: which task a message asks for, how sure that is, and why.

Cascade: an explicit choice, the head (`agents.reader`, with what users' corrections have taught it), a closed-choice
engine call when the head is unsure and settings allow it, the user. It is a `BaseDecisionModel`, so it works in any
langchain program; `route` is what the gateway calls. It runs no task.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, TypeVar

from langchain_core.decisions import BaseDecisionModel, Choice, ChoiceAnswer, ClassifierResponse, Question, State
from langchain_core.messages import BaseMessage
from pydantic import PrivateAttr
from typing_extensions import override

from agents.command import split_command
from agents.encoder import Encoder
from agents.instruction import split_instruction
from agents.learning import Learned
from agents.plan import describe, words_between
from agents.plugin_match import PluginMatch
from agents.reader.plans import TASKS
from agents.reader.reader import DECLINED, Reading, shared_reader
from agents.reader.why import cues, snap, step_spans
from onebox.errors import OneboxError
from onebox.events import Routed, Step
from onebox.labels import Label
from onebox.messages import Message, Role
from onebox.plugin import LLM, Plugin
from onebox.settings import Settings

T = TypeVar("T")
Tier = Literal["explicit", "head", "engine", "default"]
FALLBACK: Final = "chat"
# A 0.5B engine is right on 29 % of hard messages, far behind the head: it only tips near ties.
ENGINE_WEIGHT: Final = 0.3
PLAN_DOUBT: Final = 0.2  # whether a message asks for several steps is asked of the engine from 0.3 to 0.7
PROMPT_CHARS: Final = 800
_PROMPT: Final = (
    "Which kind of work does the user's last message ask for? Answer with one word.\n{menu}\n\nMessage:\n{text}"
)
_STEPS_PROMPT: Final = (
    "Does the user's last message ask for one piece of work, or for several ones after another ({steps})? Answer with "
    "one word.\n\nMessage:\n{text}"
)
_MENU: Final = {
    "summarize": "condense a given text",
    "translate": "put given words into another language",
    "qa": "answer a question, explain, list",
    "reason": "calculate, solve, deduce",
    "write": "compose, rewrite or polish a text",
    "chat": "small talk, or a request about devices, bookings or live data",
}


class Router(BaseDecisionModel):
    """Messages to tasks. `Router()` knows the built-in tasks; `Router.load` those of a gateway."""

    model: str = "onebox-router"

    _encoder: Encoder = PrivateAttr(default_factory=Encoder)
    _learned: Learned = PrivateAttr(default_factory=Learned)
    _thread: ThreadPoolExecutor = PrivateAttr(default_factory=lambda: ThreadPoolExecutor(1, "router"))
    _tasks: tuple[str, ...] = PrivateAttr(default=TASKS)
    _summaries: dict[str, str] = PrivateAttr(default_factory=dict)
    _match: PluginMatch | None = PrivateAttr(default=None)
    _threshold: float = PrivateAttr(default=0.6)
    _engine: bool = PrivateAttr(default=True)

    @classmethod
    def load(cls, plugins: Mapping[str, Plugin], settings: Settings) -> "Router":
        """A router over `plugins`. Returns at once; its models load with `warm` or the first message."""
        router = cls()
        router._encoder = Encoder(_cache_dir(settings.home_dir))
        router._tasks = tuple(plugins) or TASKS
        router._summaries = {name: plugin.summary["en"] for name, plugin in plugins.items() if name not in TASKS}
        others = [plugin for name, plugin in plugins.items() if name not in TASKS]
        router._match = PluginMatch(others, router._encoder) if others else None
        router._threshold = settings.router_threshold
        router._engine = settings.router_engine
        return router

    @property
    def encoder(self) -> Encoder:
        """The embedding model, to be shared with whoever else needs one in this process."""
        return self._encoder

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks a message can be routed to."""
        return self._tasks

    @property
    def refused(self) -> Mapping[str, str]:
        """Plugins that are never picked by themselves, and why; known once the first message has been routed."""
        return self._match.refused if self._match is not None else {}

    async def warm(self) -> None:
        """Load what the first decision needs, in a thread."""
        await self._in_thread(lambda: self._judge((Message("user", "hello"),), ""))

    async def learn(self, shared: Sequence[Label], own: Mapping[str, Sequence[Label]]) -> Mapping[str, str]:
        """Decide from now on as these labels say, `own` those of a tenant; why some are not used, by their ids."""
        learned, reasons = await asyncio.to_thread(lambda: Learned.of(shared, own))
        self._learned = learned
        return reasons

    async def route(
        self,
        messages: Sequence[Message],
        *,
        explicit: str | None = None,
        plan: Sequence[str] = (),
        llm: LLM | None = None,
        tenant: str = "",
    ) -> Routed:
        """The decision for the last user message of `messages`, as the corrections of `tenant` have taught it.

        `explicit` is a choice already made, and so is a `plan`, or a message that begins with `/task`. `llm` is asked
        when the head is unsure and the settings allow it; an engine that fails is passed over. `task` is the first
        step's.
        """
        began = time.perf_counter()
        asked = [index for index, message in enumerate(messages) if message.role == "user"]
        if plan:
            shares = {task: float(task == plan[0]) for task in dict.fromkeys((*self._tasks, *plan))}
            text = messages[asked[-1]].text if asked else ""
            steps = await self._in_thread(lambda: describe(split_instruction(text), text, plan))
            return Routed(plan[0], tuple(plan), shares, "explicit", _since(began), steps=steps)
        command = split_command(messages[asked[-1]].text, self._tasks) if asked else None
        chosen = explicit if explicit is not None else command[0] if command is not None else None
        if chosen is not None:
            shares = {task: float(task == chosen) for task in dict.fromkeys((*self._tasks, chosen))}
            return Routed(chosen, (chosen,), shares, "explicit", _since(began))
        if not asked or not messages[asked[-1]].text.strip():
            fallback = FALLBACK if FALLBACK in self._tasks else self._tasks[0]
            shares = {task: float(task == fallback) for task in self._tasks}
            return Routed(fallback, (fallback,), shares, "default", _since(began))
        heard = tuple(messages[: asked[-1] + 1])
        reading, shares = await self._in_thread(lambda: self._judge(heard, tenant))
        tier: Tier = "head"
        if max(shares.values()) < self._threshold and self._engine and llm is not None:
            asked_engine = await self._ask_engine(heard, shares, llm)
            if asked_engine is not None:
                shares, tier = asked_engine, "engine"
        if self._engine and llm is not None and abs(reading.several - 0.5) < PLAN_DOUBT:
            reading = await self._ask_for_steps(heard, reading, llm)
        found = self._plan(reading, shares)
        text = heard[-1].text
        steps = _steps(reading, text, found)
        ask = max(shares.values()) < self._threshold
        declined = found == (FALLBACK,) and reading.unsupported >= DECLINED
        why = cues(reading, text, found[0])
        return Routed(found[0], found, shares, tier, _since(began), why, ask, steps, declined)

    @property
    @override
    def _provider(self) -> str:
        return "onebox"

    @override
    def _classify(self, state: State, questions: dict[str, Question]) -> ClassifierResponse:
        """Answer `Choice` questions whose labels are tasks of this router.

        Raises:
            ValueError: another kind of question, a label that is no task, or a state without a message.
        """
        messages = _as_messages(state)
        if not messages or messages[-1].role != "user":
            raise ValueError(
                "The state has no user message at its end: give a text or messages that end with the user's."
            )
        _, shares = self._judge(messages, "")
        answers: dict[str, ChoiceAnswer] = {}
        for name, question in questions.items():
            if not isinstance(question, Choice):
                raise ValueError(
                    f"Question {name!r} is a {question.type!r}: the router picks tasks. Ask a Choice instead."
                )
            if unknown := sorted(set(question.criteria) - set(shares)):
                raise ValueError(
                    f"Question {name!r} offers {unknown!r}, no tasks of this router; known: {list(self._tasks)!r}."
                )
            total = sum(shares[label] for label in question.criteria) or 1.0
            part = {label: shares[label] / total for label in question.criteria}
            best = max(part, key=lambda label: part[label])
            answers[name] = ChoiceAnswer(
                type="choice", choice=best, probabilities=part, confidence=min(part[best], 1.0)
            )
        return ClassifierResponse(model=self.model, answers=dict(answers))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """What takes as long as a text has words: not in the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _judge(self, messages: Sequence[Message], tenant: str) -> tuple[Reading, dict[str, float]]:
        reading = self._learned.taught(shared_reader().read(messages), tenant)
        known = {task: share for task, share in reading.shares.items() if task in self._tasks}
        if self._match is not None:
            taken = self._match.shares(reading.instruction)
            rest = max(0.0, 1.0 - sum(taken.values()))
            known = {task: p * rest for task, p in known.items()} | taken
        total = sum(known.values())
        if total <= 0:
            known = dict.fromkeys(self._tasks, 1.0)
            total = float(len(known))
        return reading, {task: known.get(task, 0.0) / total for task in self._tasks}

    def _plan(self, reading: Reading, shares: Mapping[str, float]) -> tuple[str, ...]:
        """The steps: several where the reader has found them and nothing else has been decided meanwhile."""
        task, plan = max(shares, key=lambda name: shares[name]), reading.plan
        several = len(plan) > 1 and all(step in self._tasks for step in plan)
        return plan if several and task in (reading.task, *plan[:1]) else (task,)

    async def _ask_engine(
        self, messages: Sequence[Message], shares: dict[str, float], llm: LLM
    ) -> dict[str, float] | None:
        options = sorted(self._tasks)
        menu = "\n".join(f"{name}: {_MENU.get(name) or self._summaries.get(name, name)}" for name in options)
        return await _tipped(llm, _PROMPT.format(menu=menu, text=_shown(messages[-1].text)), options, shares)

    async def _ask_for_steps(self, messages: Sequence[Message], reading: Reading, llm: LLM) -> Reading:
        shares = {"one": 1 - reading.several, "several": reading.several}
        prompt = _STEPS_PROMPT.format(steps=", ".join(reading.chain), text=_shown(messages[-1].text))
        tipped = await _tipped(llm, prompt, sorted(shares), shares)
        if tipped is None:
            return reading
        plan = reading.chain if tipped["several"] >= 0.5 else (reading.task,)
        return replace(reading, plan=plan, several=tipped["several"])


async def _tipped(
    llm: LLM, prompt: str, options: Sequence[str], shares: Mapping[str, float]
) -> dict[str, float] | None:
    """Shares with the engine's choice among `options` in them; None where the engine fails."""
    try:
        chosen = await llm.choose([Message("user", prompt)], options)
    except OneboxError:
        return None
    opinion = dict(chosen.probabilities) or {name: 0.9 if name == chosen.option else 0.02 for name in options}
    mixed = {name: share * max(opinion.get(name, 0.0), 1e-3) ** ENGINE_WEIGHT for name, share in shares.items()}
    total = sum(mixed.values())
    return {name: share / total for name, share in mixed.items()}


def _shown(text: str) -> str:
    """What the engine is shown of a message: of a long one the beginning and the end."""
    if len(text) <= PROMPT_CHARS:
        return text
    return f"{text[: PROMPT_CHARS // 2]} … {text[-PROMPT_CHARS // 2 :]}"


def _steps(reading: Reading, text: str, plan: Sequence[str]) -> tuple[Step, ...]:
    """The steps of a plan with the words that ask for them: by the verbs of their clauses, or as they were read."""
    steps = describe(reading.instruction, text, plan)
    if all(step.words for step in steps):
        return steps
    spans = snap(step_spans(reading, plan), text)
    if not spans:
        return steps
    worded = []
    for step, (start, end) in zip(steps, spans, strict=True):
        worded.append(replace(step, words=words_between(text, start, end), start=start, end=end))
    return tuple(worded)


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 3)


def _cache_dir(home: Path) -> Path:
    return home / "cache"


def _as_messages(state: object) -> tuple[Message, ...]:
    if isinstance(state, str):
        return (Message("user", state),)
    if isinstance(state, BaseMessage):
        roles: dict[str, Role] = {"ai": "assistant", "system": "system"}
        return (Message(roles.get(state.type, "user"), state.text),)
    if isinstance(state, Mapping):
        if "messages" in state:
            return _as_messages(state["messages"])
        role, content = state.get("role", "user"), state.get("content", state.get("text", ""))
        known: dict[object, Role] = {"assistant": "assistant", "ai": "assistant", "system": "system"}
        return (Message(known.get(role, "user"), str(content)),)
    if isinstance(state, Sequence):
        return tuple(message for part in state for message in _as_messages(part))
    return ()
