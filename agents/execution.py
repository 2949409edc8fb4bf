"""The execution of one run on its owner: the plan's plugins in order, as events in the run's log, with one end.

It assigns every event that is not the plugin's own and counts what was spent. A run taken over from another worker is
executed again from its start against its journal and log. Who owns a run is `agents.runs`; writing is
`agents.run_log`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from pydantic import ValidationError

from agents.context import EngineLLM, Meter, RunContext
from agents.conversations import Fault, Variant
from agents.engine import Card, EngineClient
from agents.instruction import split_instruction
from agents.journal import Diverged, Entry, Journal
from agents.metrics import Metrics
from agents.replay import Replay
from agents.router import Router
from agents.run_log import RunLog
from agents.run_store import Ending, RunRequest
from agents.store import Store
from onebox.errors import BadRequest, Internal, OneboxError, PluginFailed, Timeout, Unavailable
from onebox.events import (
    Check,
    Citation,
    Completed,
    Event,
    Failed,
    Output,
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
ENGINE_PAUSE_S: Final = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Executor:
    """Everything runs share in one worker."""

    settings: Settings
    plugins: Mapping[str, Plugin]
    router: Router
    engine: EngineClient
    store: Store
    metrics: Metrics

    async def decide(self, request: RunRequest, messages: tuple[Message, ...], meter: Meter, name: str) -> Routed:
        """The route of a request, without the work. `name` and `meter` are for the engine call, where there is one."""
        llm: EngineLLM | None = None
        if self.settings.router_engine and request.task is None:
            llm = self.llm(request, await self.engine.card(), meter, Journal(_unnoted), f"{name}-route")
        routed = await self.router.route(messages, explicit=request.task, llm=llm)
        self.metrics.count_route(routed.tier, routed.task)
        return routed

    def llm(self, request: RunRequest, card: Card, meter: Meter, journal: Journal, name: str) -> EngineLLM:
        """The engine as one run sees it; `name` begins the names of its calls."""
        room = min(self.settings.max_tokens_default, card.context_length)
        session = request.conversation_id
        return EngineLLM(self.engine, card, meter, journal, name, request.tenant, session, room)


@dataclass(frozen=True, slots=True)
class Before:
    """What an earlier owner left of a run. `refusal` ends it instead of going on."""

    events: Sequence[Event] = ()
    entries: Sequence[Entry] = ()
    taken_over: bool = False
    refusal: OneboxError | None = None


@dataclass(slots=True)
class _Seen:
    """What the log has so far, as far as the end of the run needs it."""

    pieces: list[str] = field(default_factory=list)
    routed: Routed | None = None
    began: bool = False


class Execution:
    """One run at work. `run` it once, as a task of the worker's; `stop` and `abandon` end it early."""

    def __init__(
        self,
        executor: Executor,
        request: RunRequest,
        messages: tuple[Message, ...],
        created: float,
        before: Before,
        open_log: Callable[[Callable[[], None], Callable[[], None]], RunLog],
    ) -> None:
        self._executor = executor
        self._request = request
        self._messages = messages
        self._before = before
        self._deadline = created + executor.settings.run_timeout_s
        self._started = time.monotonic()
        self._meter = Meter()
        self._step = RAW if request.raw else AUTO
        self._seen = _Seen()
        self._replay = Replay(before.events[1:])
        self.log = open_log(self.stop, self.abandon)
        self._journal = Journal(self.log.note, before.entries)
        self._work: asyncio.Task[Completed] | None = None
        self._stopping: asyncio.Task[Stopped] | None = None
        self._abandoned = False
        self._began_again = False
        for event in before.events:
            self._see(event)

    @property
    def name(self) -> str:
        """What the engine knows this run's calls by; another owner's calls have another name."""
        return f"{self._request.run_id}-{self.log.epoch}"

    async def run(self) -> None:
        """Execute to the end and return once that is stored, or once another worker has the run."""
        metrics = self._executor.metrics
        metrics.running.inc()
        try:
            self._work = asyncio.create_task(self._execute(), name=self._request.run_id)
            ended = await self._ended(self._work)
            if ended is not None:
                self._end(ended)
                await asyncio.wait((self.log.ended,))
                task = self._seen.routed.task if self._seen.routed else self._step
                spent = self._meter
                metrics.count_run(task, ended.kind, spent.prompt_tokens, spent.completion_tokens)
        finally:
            metrics.running.dec()
            if self._work is not None:
                self._work.cancel()
            if self._stopping is not None:
                self._stopping.cancel()

    def stop(self) -> None:
        """Stop for somebody: no more text, the engine freed, a receipt as the end."""
        if self._stopping is None and not self._abandoned:
            self.log.freeze()
            self._stopping = asyncio.create_task(self._receipt(), name=f"stop {self._request.run_id}")
            if self._work is not None:
                self._stopping.add_done_callback(lambda _: self._work and self._work.cancel())

    def abandon(self) -> None:
        """Leave the run to another worker: nothing more is written here."""
        if not self._abandoned:
            self._abandoned = True
            self.log.close()
            if self._work is not None:
                self._work.cancel()

    async def _ended(self, work: "asyncio.Task[Completed]") -> Completed | Failed | Stopped | None:
        if self._stopping is not None:  # before the work began
            work.cancel()
        await asyncio.wait((work,))
        if self._abandoned:
            return None
        if self._stopping is not None:
            return await self._stopping
        try:
            return work.result()
        except asyncio.CancelledError:
            return None
        except TimeoutError:
            seconds = self._executor.settings.run_timeout_s
            return _failed(Timeout(f"The run took longer than {seconds:g} s and was ended."))
        except Diverged as error:
            logger.error("Run %s diverged from its journal: %s", self._request.run_id, error)
            return _failed(
                PluginFailed(
                    f"The reply could not go on after its server process ended: plugin {self._step!r} did not repeat "
                    "what it had done. What came before is kept. Regenerate it."
                )
            )
        except OneboxError as error:
            return _failed(error)
        except Exception:
            logger.exception("Run %s failed in %r", self._request.run_id, self._step)
            return _failed(self._defect())

    async def _execute(self) -> Completed:
        if self._before.refusal is not None:
            raise self._before.refusal
        async with asyncio.timeout(max(0.0, self._deadline - time.time())):
            async with aclosing(self._events()) as events:
                async for event in events:
                    if self._stopping is not None:
                        await asyncio.get_running_loop().create_future()  # until cancelled, once the engine is free
                    self._emit(event)
                    await self.log.room()
        if not (self._replay.done and self._journal.used_up):
            raise Diverged("the plugins ended before what they had done")
        return Completed(self._meter.finish)

    def _emit(self, event: Event) -> None:
        events = [event]
        if isinstance(event, TextDelta):
            if not (event.text or event.tokens):
                return
            if not self._began_again:
                self._began_again = True
                events = [Output("item_added"), Output("part_added"), event]
        fresh = [new for each in events if (new := self._replay.fresh(each)) is not None]
        for each in fresh:
            self._see(each)
        if fresh:
            self.log.put(*fresh)

    def _see(self, event: Event) -> None:
        seen = self._seen
        if isinstance(event, TextDelta):
            if not seen.pieces and not self._before.taken_over:
                self._executor.metrics.first_token_s.observe(time.monotonic() - self._started)
            seen.pieces.append(event.text)
        elif isinstance(event, Routed):
            seen.routed = event
        elif isinstance(event, Output):
            seen.began = True

    def _end(self, ended: Completed | Failed | Stopped) -> None:
        """Log the end, all in one step."""
        events: list[Event] = []
        if self._seen.began:
            events += [Output("text_done"), Output("part_done"), Output("item_done")]
        usage = Usage(self._meter.prompt_tokens, self._meter.completion_tokens)
        events += [usage, ended]
        text = "".join(self._seen.pieces)
        variant: Variant | None = None
        if self._request.conversation_id is not None:
            routed = self._seen.routed
            fault = Fault(ended.code, ended.message) if isinstance(ended, Failed) else None
            task = routed.task if routed else None
            receipt = ended if isinstance(ended, Stopped) else None
            variant = Variant(self._request.run_id, text, task, routed, ended.kind, fault, usage, receipt=receipt)
        retry = isinstance(ended, Failed) and ended.retryable and not text
        self.log.end(events, Ending(ended.kind, variant, retry))

    async def _receipt(self) -> Stopped:
        meter = self._meter
        room, drawn = meter.open_room, meter.open_tokens
        if not meter.drawn:
            earlier = sum(len(entry.value[1]) for entry in self._before.entries if entry.kind == "frame")
            return Stopped(max(earlier, meter.completion_tokens))
        receipt = await self._executor.engine.abort_prefix(f"{self.name}-")
        more = max(0, receipt.tokens - drawn) if receipt.tokens is not None else 0
        freed_ms = round(receipt.freed_ms, 1) if receipt.freed_ms is not None else None
        return Stopped(meter.completion_tokens + more, max(0, room - more), freed_ms)

    async def _events(self) -> AsyncGenerator[Event, None]:
        request, executor = self._request, self._executor
        llm = executor.llm(request, await self._card(), self._meter, self._journal, self.name)
        if request.raw:
            async with aclosing(llm.stream(self._messages, request.sampling)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        routed = self._seen.routed or request.routed
        if routed is None:
            routed = await executor.decide(request, self._messages, self._meter, self.name)
        yield routed
        plan = [executor.plugins[name] for name in routed.plan or (routed.task,)]
        options = _fit_params(plan, request.params)
        messages = _without_command(self._messages, routed) if request.task is None else self._messages
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
                self._journal,
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

    async def _card(self) -> Card:
        """What the fleet serves, as the run knew it from its start; a run taken over waits for a fleet that starts."""
        engine = self._executor.engine
        patience_s = self._executor.settings.engine_patience_s if self._before.taken_over else 0.0
        until = time.monotonic() + patience_s
        key = self._journal.open("card")
        if (entry := await self._journal.answer(key)) is not None:
            return Card(*entry.value)
        while True:
            try:
                card = await engine.card()
            except Unavailable:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(ENGINE_PAUSE_S)
            else:
                self._journal.note(key, "value", [card.id, card.context_length])
                return card

    def _defect(self) -> OneboxError:
        if self._step in self._executor.plugins:
            return PluginFailed(
                f"Plugin {self._step!r} failed: it has a defect, which the log describes. Try another task."
            )
        return Internal("The gateway failed: it has a defect, which the log describes.")


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


def _unnoted(entry: Entry) -> None:
    """The router's calls are no part of a run's journal: its decision is in the log."""


def _failed(error: OneboxError) -> Failed:
    return Failed(error.code, error.message, error.retryable, error.retry_after_s, error.param)


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
