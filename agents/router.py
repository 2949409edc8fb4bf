"""The router agent: which task a message asks for, how sure that is, and why.

Cascade: an explicit choice, the linear head, a closed-choice engine call when the head is unsure. It is a
`BaseDecisionModel`, so it works in any langchain program; `route` is what the gateway calls. It runs no task.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
from langchain_core.decisions import BaseDecisionModel, Choice, ChoiceAnswer, ClassifierResponse, Question, State
from langchain_core.messages import BaseMessage
from numpy.typing import NDArray
from pydantic import PrivateAttr
from typing_extensions import override

from agents.encoder import Encoder, Together
from agents.instruction import split_instruction
from agents.plan import describe, find_steps
from agents.plugin_match import PluginMatch
from agents.router_features import TASKS
from agents.router_head import Head, Judgement
from onebox.errors import OneboxError
from onebox.events import Routed
from onebox.messages import Message, Role
from onebox.plugin import LLM, Plugin
from onebox.settings import Settings

Tier = Literal["explicit", "head", "engine", "default"]
FALLBACK: Final = "chat"
# A 0.5B engine is right on 29 % of hard messages, far behind the head: it only tips near ties.
ENGINE_WEIGHT: Final = 0.3
INLINE_CHARS: Final = 600
PROMPT_CHARS: Final = 800
_PROMPT: Final = (
    "Which kind of work does the user's last message ask for? Answer with one word.\n{menu}\n\nMessage:\n{text}"
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

    _head: Head = PrivateAttr()
    _encoder: Encoder = PrivateAttr()
    _together: Together = PrivateAttr()
    _tasks: tuple[str, ...] = PrivateAttr(default=TASKS)
    _summaries: dict[str, str] = PrivateAttr(default_factory=dict)
    _match: PluginMatch | None = PrivateAttr(default=None)
    _threshold: float = PrivateAttr(default=0.6)
    _engine: bool = PrivateAttr(default=True)

    @override
    def model_post_init(self, context: object, /) -> None:
        super().model_post_init(context)
        self._head = Head.load()
        self._use(Encoder())

    @classmethod
    def load(cls, plugins: Mapping[str, Plugin], settings: Settings) -> "Router":
        """A router over `plugins`. Returns at once; the embedding model loads with `warm` or the first message."""
        router = cls()
        router._use(Encoder(_cache_dir(settings.home_dir)))
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

    async def warm(self) -> None:
        """Load what the first decision needs, in a thread."""
        await asyncio.to_thread(self._judge_alone, (Message("user", "hello"),))

    async def route(
        self,
        messages: Sequence[Message],
        *,
        explicit: str | None = None,
        plan: Sequence[str] = (),
        llm: LLM | None = None,
    ) -> Routed:
        """The decision for the last user message of `messages`.

        `explicit` is a choice already made, and so is a `plan`, or a message that begins with `/task`. `llm` is asked
        when the head is unsure and the settings allow it; an engine that fails is passed over. `task` is the first
        step's.
        """
        began = time.perf_counter()
        asked = [index for index, message in enumerate(messages) if message.role == "user"]
        if plan:
            shares = {task: float(task == plan[0]) for task in dict.fromkeys((*self._tasks, *plan))}
            text = messages[asked[-1]].text if asked else ""
            steps = describe(split_instruction(text), text, plan)
            return Routed(plan[0], tuple(plan), shares, "explicit", _since(began), steps=steps)
        chosen = explicit if explicit is not None else self.command(messages[asked[-1]].text) if asked else None
        if chosen is not None:
            shares = {task: float(task == chosen) for task in dict.fromkeys((*self._tasks, chosen))}
            return Routed(chosen, (chosen,), shares, "explicit", _since(began))
        if not asked or not messages[asked[-1]].text.strip():
            fallback = FALLBACK if FALLBACK in self._tasks else self._tasks[0]
            shares = {task: float(task == fallback) for task in self._tasks}
            return Routed(fallback, (fallback,), shares, "default", _since(began))
        heard = tuple(messages[: asked[-1] + 1])
        if self._encoder.loaded and sum(len(messages[index].text) for index in asked[-3:]) <= INLINE_CHARS:
            judgement, shares = self._judge(heard, await self._together.embed(self._head.embedded(heard)))
        else:
            judgement, shares = await asyncio.to_thread(self._judge_alone, heard)
        tier: Tier = "head"
        if max(shares.values()) < self._threshold and self._engine and llm is not None:
            asked_engine = await self._ask_engine(heard, shares, llm)
            if asked_engine is not None:
                shares, tier = asked_engine, "engine"
        task = max(shares, key=lambda name: shares[name])
        text = heard[-1].text
        steps = find_steps(judgement.instruction, text, task, self._tasks)
        planned = tuple(step.task for step in steps) or (task,)
        task = planned[0]
        cues = self._head.cues(judgement, text, task) if task in TASKS else ()
        ask = max(shares.values()) < self._threshold
        return Routed(task, planned, shares, tier, _since(began), cues, ask, steps)

    def command(self, text: str) -> str | None:
        """The task a message beginning with `/task` asks for."""
        word, _, _ = text.lstrip().partition("\n")[0].partition(" ")
        return word[1:] if word.startswith("/") and word[1:] in self._tasks else None

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
        _, shares = self._judge_alone(messages)
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

    def _use(self, encoder: Encoder) -> None:
        self._encoder, self._together = encoder, Together(encoder)

    def _judge_alone(self, messages: Sequence[Message]) -> tuple[Judgement, dict[str, float]]:
        return self._judge(messages, self._encoder.embed(self._head.embedded(messages)))

    def _judge(self, messages: Sequence[Message], vectors: NDArray[np.float32]) -> tuple[Judgement, dict[str, float]]:
        judgement = self._head.judge(messages, vectors)
        known = {task: float(p) for task, p in zip(TASKS, judgement.probabilities, strict=True) if task in self._tasks}
        if self._match is not None:
            taken = self._match.shares(judgement.instruction.text, judgement.embedding)
            rest = max(0.0, 1.0 - sum(taken.values()))
            known = {task: p * rest for task, p in known.items()} | taken
        total = sum(known.values())
        if total <= 0:
            known = dict.fromkeys(self._tasks, 1.0)
            total = float(len(known))
        return judgement, {task: known.get(task, 0.0) / total for task in self._tasks}

    async def _ask_engine(
        self, messages: Sequence[Message], shares: dict[str, float], llm: LLM
    ) -> dict[str, float] | None:
        options = sorted(self._tasks)
        menu = "\n".join(f"{name}: {_MENU.get(name) or self._summaries.get(name, name)}" for name in options)
        text = messages[-1].text
        if len(text) > PROMPT_CHARS:
            text = f"{text[: PROMPT_CHARS // 2]} … {text[-PROMPT_CHARS // 2 :]}"
        try:
            chosen = await llm.choose([Message("user", _PROMPT.format(menu=menu, text=text))], options)
        except OneboxError:
            return None
        opinion = dict(chosen.probabilities) or {name: 0.9 if name == chosen.option else 0.02 for name in options}
        mixed = {task: share * max(opinion.get(task, 0.0), 1e-3) ** ENGINE_WEIGHT for task, share in shares.items()}
        total = sum(mixed.values())
        return {task: share / total for task, share in mixed.items()}


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
