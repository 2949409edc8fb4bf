"""The execution of one run on its owner: the plan's plugins in order, as events in the run's log, with one end.

It assigns every event that is not the plugin's own and counts what was spent. A run taken over from another worker is
executed again from its start against its journal and log. What runs share is `agents.executor`, who owns one
`agents.runs`; writing is `agents.run_log`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Final

from agents.command import split_command
from agents.context import RunContext
from agents.conversations import Fault, Variant
from agents.executor import Executor
from agents.journal import Diverged, Entry, Journal
from agents.llm import Meter
from agents.params import fit_params
from agents.replay import Replay
from agents.run_log import RunLog
from agents.run_store import Ending, RunRequest
from agents.steps import changed_by_user, request_of
from agents.store_keys import RunKeys
from agents.tracing import Span
from onebox import logs
from onebox.errors import Internal, OneboxError, PluginFailed, Timeout
from onebox.events import (
    Check,
    Citation,
    Completed,
    Event,
    Failed,
    Output,
    Progress,
    Queued,
    Replanned,
    Routed,
    Step,
    StepDone,
    StepStarted,
    Stopped,
    TextDelta,
    Usage,
)
from onebox.messages import Message, user
from onebox.plans import replan, steps_of
from onebox.plugin import Plugin, Sampling, Task, TaskParams

RAW: Final = "raw"
AUTO: Final = "auto"
PROGRESS_TEXT_MAX: Final = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Before:
    """What an earlier owner left of a run. `refusal` ends it instead of going on."""

    events: Sequence[Event] = ()
    entries: Sequence[Entry] = ()
    taken_over: bool = False
    refusal: OneboxError | None = None

    @property
    def has_reply(self) -> bool:
        """Whether an engine had begun to answer."""
        return any(entry.kind in ("frame", "end") for entry in self.entries)

    @property
    def position(self) -> int:
        """Where it stood in the queue, as last told; 0 where it did not wait."""
        return next((event.position for event in reversed(self.events) if isinstance(event, Queued)), 0)


@dataclass(slots=True)
class _Seen:
    """What the log has so far, as far as the end of the run needs it."""

    pieces: list[str] = field(default_factory=list)
    routed: Routed | None = None
    changed: Routed | None = None  # the same with the plan that a user has changed
    first_s: float | None = None  # from the start to the first text
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
        self._claim = executor.admission.claim(request.tenant, self._wait, begun=before.has_reply, told=before.position)
        self._claim.name_step(self._step)
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
        logs.bind(run=self._request.run_id, tenant=self._request.tenant)
        metrics = self._executor.metrics
        metrics.running.inc()
        try:
            with self._executor.tracer.span("run", parent=self._request.traceparent) as span:
                span.note(onebox__run=self._request.run_id, onebox__tenant=logs.hashed(self._request.tenant))
                self._work = asyncio.create_task(self._execute(), name=self._request.run_id)
                ended = await self._ended(self._work)
                self._claim.leave()
                if ended is not None:
                    self._end(ended)
                    await asyncio.wait((self.log.ended,))
                    self._account(ended, span)
        finally:
            metrics.running.dec()
            self._claim.leave()
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

    def _account(self, ended: Completed | Failed | Stopped, span: Span) -> None:
        """Say what the run was and what it cost."""
        spent, seconds = self._meter, time.monotonic() - self._started
        self._executor.metrics.count_run(self._task, ended.kind, spent.prompt_tokens, spent.completion_tokens, seconds)
        if isinstance(ended, Completed) and self._seen.first_s is not None:
            self._executor.pace.note(self._seen.first_s, spent.completion_tokens, seconds)
        span.note(onebox__task=self._task, onebox__state=ended.kind, onebox__epoch=self.log.epoch)
        span.note(gen_ai__usage__input_tokens=spent.prompt_tokens, gen_ai__usage__output_tokens=spent.completion_tokens)
        code = ended.code if isinstance(ended, Failed) else None
        if code is not None:
            span.fail(code)
        logger.info(
            "Run of %r %s%s in %.3f s, %d + %d tokens",
            self._task,
            ended.kind,
            f" ({code})" if code else "",
            seconds,
            spent.prompt_tokens,
            spent.completion_tokens,
        )

    @property
    def _task(self) -> str:
        """The first task of the route, as soon as there is one."""
        return self._seen.routed.task if self._seen.routed else self._step

    @contextmanager
    def _measured(self, plugin: str) -> Iterator[None]:
        """Count and trace the work of a plugin."""
        began, end = time.monotonic(), "stopped"
        try:
            with self._executor.tracer.span(f"plugin {plugin}"):
                yield
            end = "ok"
        except Exception:
            end = "failed"
            raise
        finally:
            self._executor.metrics.count_plugin(plugin, end, time.monotonic() - began)

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

    def _wait(self, position: int, wait_s: float | None) -> None:
        """Log where the run stands in the queue; that is no part of what it does."""
        if self._stopping is None:
            self.log.put(Queued(position, wait_s))

    def _see(self, event: Event) -> None:
        seen = self._seen
        if isinstance(event, TextDelta):
            if not seen.pieces and not self._before.taken_over:
                seen.first_s = time.monotonic() - self._started
                self._executor.metrics.count_first_token(self._task, seen.first_s)
            seen.pieces.append(event.text)
        elif isinstance(event, Routed):
            seen.routed = event
        elif isinstance(event, Replanned) and seen.routed is not None:
            seen.changed = replan(seen.changed or seen.routed, event)
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
            routed = self._seen.changed or self._seen.routed
            fault = Fault(ended.code, ended.message) if isinstance(ended, Failed) else None
            task = routed.task if routed else None
            receipt = ended if isinstance(ended, Stopped) else None
            variant = Variant(self._request.run_id, text, task, routed, ended.kind, fault, usage, receipt=receipt)
        retry = isinstance(ended, Failed) and ended.retryable and not text
        self.log.end(events, Ending(ended.kind, variant, retry))

    async def _receipt(self) -> Stopped:
        meter = self._meter
        standing = meter.standing()
        if not meter.drawn:
            earlier = sum(len(entry.value[1]) for entry in self._before.entries if entry.kind == "frame")
            return Stopped(max(earlier, meter.completion_tokens))
        receipt = await self._executor.engines.abort_prefix(f"{self.name}-")
        freed_ms = round(receipt.freed_ms, 1) if receipt.freed_ms is not None else None
        return Stopped(*standing.ended(receipt.tokens, meter.completion_tokens), freed_ms)

    async def _events(self) -> AsyncGenerator[Event, None]:
        request, executor = self._request, self._executor
        llm = executor.llm(request, self._meter, self._journal, self.name, self._claim)
        # A run taken over waits for a fleet that starts.
        patience_s = executor.settings.engine_patience_s if self._before.taken_over else 0.0
        if request.raw:
            wanted = executor.engines.spec.order(None) if request.model is None else (request.model,)
            await llm.bind(wanted, patience_s)
            async with aclosing(llm.stream(self._messages, request.sampling)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        routed = self._seen.routed or request.routed
        if routed is None:
            routed = await executor.decide(request, self._messages, self._meter, self.name, self._claim)
        steps = steps_of(routed)
        messages = _without_command(self._messages, routed) if request.task is None else self._messages
        plan, options = self._planned(steps)
        run_key = RunKeys(request.tenant, request.run_id).run
        asked, previous, index = messages[-1].text, "", 0
        while index < len(plan):
            plugin, params, last = plan[index], options[index], index == len(plan) - 1
            self._step = plugin.name
            self._claim.name_step(plugin.name)
            await llm.bind(executor.engines.spec.order(plugin.name), patience_s)
            if index == 0:
                yield routed
            yield StepStarted(index, plugin.name)
            if not last:
                yield Progress(index, len(plan), plugin.name)
            pieces: list[str] = []
            context = RunContext(
                llm,
                self._journal,
                executor.router.encoder,
                executor.store,
                executor.capabilities,
                request.run_id,
                request.tenant,
                plugin.name,
                self._deadline,
                logger,
            )
            if len(plan) > 1:
                messages = (*messages[:-1], user(request_of(steps, index, asked, previous)))
            sampling = request.sampling if last else Sampling(seed=request.sampling.seed)
            task = Task(messages, params, sampling, routed.declined)
            with self._measured(plugin.name):
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
            index += 1
            if last:
                return
            previous = "".join(pieces)
            yield Progress(index, len(plan), previous[:PROGRESS_TEXT_MAX])
            if (changed := await changed_by_user(self._journal, executor.store, run_key, steps, index)) is not None:
                steps = changed
                plan, options = self._planned(steps)
                yield Replanned(index, tuple(step.task for step in steps))
        yield TextDelta(previous)  # the steps that were to follow have been taken away

    def _planned(self, steps: Sequence[Step]) -> tuple[list[Plugin], list[TaskParams]]:
        """The plugin and the options of each step."""
        plan = [self._executor.plugins[step.task] for step in steps]
        return plan, fit_params(plan, self._request.params)

    def _defect(self) -> OneboxError:
        if self._step in self._executor.plugins:
            return PluginFailed(
                f"Plugin {self._step!r} failed: it has a defect, which the log describes. Try another task."
            )
        return Internal("The gateway failed: it has a defect, which the log describes.")


def _failed(error: OneboxError) -> Failed:
    return Failed(error.code, error.message, error.retryable, error.retry_after_s, error.param)


def _without_command(messages: tuple[Message, ...], routed: Routed) -> tuple[Message, ...]:
    """The messages without the `/task` that chose the task, as long as there is something behind it."""
    if routed.tier == "explicit" and len(routed.plan) == 1:
        found = split_command(messages[-1].text, routed.plan)
        if found is not None and found[1]:
            return (*messages[:-1], user(found[1]))
    return messages
