"""Runs: a plan's plugins executed in order, as one stream of events with exactly one terminal event at its end.

The executor assigns every event that is not the plugin's own, counts what was spent, and has the reply recorded
whatever happens, also when its reader leaves. HTTP is `agents.api`; the store is behind `agents.recording`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from pydantic import ValidationError

from agents.context import EngineLLM, Meter, RunContext
from agents.conversations import Fault, State
from agents.engine import EngineClient
from agents.instruction import split_instruction
from agents.metrics import Metrics
from agents.recording import Recording
from agents.router import Router
from agents.store import Store
from onebox.errors import BadRequest, Internal, OneboxError, PluginFailed, Timeout
from onebox.events import (
    Accepted,
    Check,
    Citation,
    Completed,
    Event,
    Failed,
    Progress,
    Routed,
    StepDone,
    StepStarted,
    Stopped,
    TextDelta,
    Usage,
)
from onebox.messages import Message, user
from onebox.plugin import Plugin, Sampling, Task, TaskParams
from onebox.settings import Settings

RAW: Final = "raw"
AUTO: Final = "auto"
PROGRESS_TEXT_MAX: Final = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What to run. `task` None lets the router decide; `raw` hands the messages to the engine as they are."""

    run_id: str
    tenant: str
    messages: tuple[Message, ...]
    task: str | None = None
    raw: bool = False
    params: Mapping[str, object] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    conversation_id: str | None = None
    routed: Routed | None = None


@dataclass(frozen=True, slots=True)
class Executor:
    """Everything runs share in one worker."""

    settings: Settings
    plugins: Mapping[str, Plugin]
    router: Router
    engine: EngineClient
    store: Store
    metrics: Metrics

    def start(self, request: RunRequest, recording: Recording | None = None) -> "Run":
        """A run that works as its events are drawn."""
        return Run(self, request, recording)

    async def decide(self, request: RunRequest) -> Routed:
        """The route of a request, without the work."""
        llm = await self.llm(request, Meter()) if self._may_ask(request) else None
        routed = await self.router.route(request.messages, explicit=request.task, llm=llm)
        self.metrics.count_route(routed.tier, routed.task)
        return routed

    async def llm(self, request: RunRequest, meter: Meter) -> EngineLLM:
        """The engine as this run sees it."""
        card = await self.engine.card()
        return EngineLLM(
            self.engine,
            card,
            meter,
            request.run_id,
            request.tenant,
            request.conversation_id,
            min(self.settings.max_tokens_default, card.context_length),
        )

    def _may_ask(self, request: RunRequest) -> bool:
        return self.settings.router_engine and request.task is None


class Run:
    """One execution. Draw `events` once, inside `aclosing`: closing it early stops the engine and records the stop."""

    def __init__(self, executor: Executor, request: RunRequest, recording: Recording | None) -> None:
        self._executor = executor
        self._request = request
        self._recording = recording
        self._deadline = time.monotonic() + executor.settings.run_timeout_s
        self._meter = Meter()
        self._step = RAW if request.raw else AUTO
        self.routed: Routed | None = None
        self.error: OneboxError | None = None

    @property
    def request(self) -> RunRequest:
        """What runs."""
        return self._request

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self._meter.prompt_tokens, self._meter.completion_tokens)

    async def events(self) -> AsyncGenerator[Event, None]:
        """The run, from `Accepted` to one terminal event. Raises nothing but cancellation; see `error`."""
        recording, metrics = self._recording, self._executor.metrics
        started, first = time.monotonic(), True
        ended: Completed | Failed | Stopped | None = None
        metrics.running.inc()
        if recording is not None:
            recording.start()
        try:
            yield Accepted(self._request.run_id, self._request.conversation_id)
            async with aclosing(self._work()) as work:
                while True:
                    async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                        event = await anext(work, None)
                    if event is None:
                        break
                    if type(event) is TextDelta:
                        if first:
                            first = False
                            metrics.first_token_s.observe(time.monotonic() - started)
                        if recording is not None:
                            recording.append(event.text)
                    yield event
            ended = Completed(self._meter.finish)
        except TimeoutError:
            ended = self._fail(
                Timeout(f"The run took longer than {self._executor.settings.run_timeout_s:g} s and was ended.")
            )
        except OneboxError as error:
            ended = self._fail(error)
        except Exception:
            logger.exception("Run %s failed in %r", self._request.run_id, self._step)
            ended = self._fail(self._defect())
        finally:
            metrics.running.dec()
            ended = await self._settle(ended or Stopped(self._meter.completion_tokens))
        yield self.usage
        yield ended

    async def _work(self) -> AsyncGenerator[Event, None]:
        request, executor = self._request, self._executor
        llm = await executor.llm(request, self._meter)
        if request.raw:
            async with aclosing(llm.stream(request.messages, request.sampling)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        routed = request.routed or await executor.router.route(
            request.messages,
            explicit=request.task,
            llm=llm if executor.settings.router_engine and request.task is None else None,
        )
        if request.routed is None:
            executor.metrics.count_route(routed.tier, routed.task)
        self.routed = routed
        if self._recording is not None:
            self._recording.route(routed)
        yield routed
        plan = [executor.plugins[name] for name in routed.plan or (routed.task,)]
        options = _fit_params(plan, request.params)
        messages = _without_command(request.messages, routed) if request.task is None else request.messages
        asked = messages[-1].text
        for index, (plugin, params) in enumerate(zip(plan, options, strict=True)):
            last = index == len(plan) - 1
            self._step = plugin.name
            yield StepStarted(index, plugin.name)
            if not last:
                yield Progress(index, len(plan), plugin.name)
            pieces: list[str] = []
            context = RunContext(
                llm,
                executor.router.encoder,
                executor.store,
                request.run_id,
                request.tenant,
                plugin.name,
                self._deadline,
                logger,
            )
            task = Task(messages, params, request.sampling if last else Sampling(seed=request.sampling.seed))
            async with aclosing(plugin.run(task, context)) as events:
                async for event in events:
                    if type(event) is TextDelta and not last:
                        pieces.append(event.text)
                    elif isinstance(event, TextDelta | Progress | Citation | Check):
                        yield event
                    else:
                        raise PluginFailed(
                            f"Plugin {plugin.name!r} sent {event.kind!r}, which is not a plugin's to send."
                        )
            yield StepDone(index, plugin.name, self._meter.finish)
            if not last:
                text = "".join(pieces)
                yield Progress(index + 1, len(plan), text[:PROGRESS_TEXT_MAX])
                messages = (*messages[:-1], user(f"{_instruction(asked)}\n\n{text}"))

    def _fail(self, error: OneboxError) -> Failed:
        self.error = error
        return Failed(error.code, error.message, error.retryable)

    def _defect(self) -> OneboxError:
        if self._step in self._executor.plugins:
            return PluginFailed(
                f"Plugin {self._step!r} failed: it has a defect, which the log describes. Try another task."
            )
        return Internal("The gateway failed: it has a defect, which the log describes.")

    async def _settle(self, ended: Completed | Failed | Stopped) -> Completed | Failed | Stopped:
        """Record the end and count it; a reply that cannot be stored has not completed."""
        if self._recording is not None:
            state: State = (
                "completed" if isinstance(ended, Completed) else "failed" if isinstance(ended, Failed) else "stopped"
            )
            fault = Fault(ended.code, ended.message) if isinstance(ended, Failed) else None
            try:
                await self._recording.end(state, fault, self.usage)
            except OneboxError as error:
                if isinstance(ended, Completed):
                    ended = self._fail(error)
        task = self.routed.task if self.routed is not None else self._step
        usage = self.usage
        self._executor.metrics.count_run(task, ended.kind, usage.prompt_tokens, usage.completion_tokens)
        return ended


def check_params(plugin: Plugin, params: Mapping[str, object]) -> TaskParams:
    """The plugin's own options out of untyped ones.

    Raises:
        BadRequest: an option is unknown or has a bad value.
    """
    try:
        return plugin.Params.model_validate(dict(params))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "params"
        known = ", ".join(repr(option) for option in plugin.Params.model_fields) or "none"
        raise BadRequest(
            f"Option {name!r} of task {plugin.name!r} is not usable: {first['msg'].lower()}. Known options: {known}.",
            param=f"params.{name}",
        ) from None


def _fit_params(plan: Sequence[Plugin], params: Mapping[str, object]) -> list[TaskParams]:
    """Each step's options; in a chain every option goes to the steps that know it, and one must."""
    if len(plan) == 1:
        return [check_params(plan[0], params)]
    known = {name for plugin in plan for name in plugin.Params.model_fields}
    if stray := sorted(set(params) - known):
        raise BadRequest(f"Option {stray[0]!r} belongs to no task of the plan.", param=f"params.{stray[0]}")
    return [
        check_params(plugin, {name: value for name, value in params.items() if name in plugin.Params.model_fields})
        for plugin in plan
    ]


def _without_command(messages: tuple[Message, ...], routed: Routed) -> tuple[Message, ...]:
    """The messages without the `/task` that chose the task, as long as there is something behind it."""
    word, _, rest = messages[-1].text.lstrip().partition(" ")
    if routed.tier == "explicit" and word == f"/{routed.task}" and rest.strip():
        return (*messages[:-1], user(rest.strip()))
    return messages


def _instruction(text: str) -> str:
    """What a message asks for, in its own words: the next step of a chain needs it beside the text so far."""
    return " ".join(text[segment.start : segment.end] for segment in split_instruction(text).segments).strip()
