"""The Gradio page: layout and wiring. What happens on an event is `ui.chat`, what it looks like is `ui.render`.

The browser keeps the id of the open conversation and sends it with every event, so a restarted page process goes on
where the old one stopped; everything else is fetched from the API. Where a conversation has a reply that is still
being written, the script asks for it (`onebox_follow`) once the conversation is drawn.
"""

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import cast
from uuid import uuid4

import gradio as gr
from gradio.components import Component
from gradio.components.chatbot import Message, MessageDict
from pydantic import ValidationError

from onebox.client import Client, Feedback
from onebox.errors import OneboxError, UnknownConversation
from onebox.records import Conversation, ConversationSummary, Readiness, TaskInfo
from ui import render
from ui.box import Boot, Box, Outcome
from ui.chat import Ask, Chat
from ui.commands import Command, UnknownCommand, parse_command
from ui.decision import task_title
from ui.layout import Layout
from ui.learning import Learnt
from ui.reply import Update
from ui.strings import Strings, pick_language, strings

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
LIST_LENGTH = 100
RATINGS: dict[object, Feedback] = {True: "like", False: "dislike", "Like": "like", "Dislike": "dislike"}
BEGIN_JS = "(...inputs) => { window.onebox.begin(); return inputs; }"
BEGIN_SEND_JS = "(...inputs) => window.onebox.send(inputs)"
HERE_JS = "() => [window.onebox.conversation()]"
BOOT_JS = "() => [JSON.stringify({c: new URLSearchParams(location.search).get('c'), lang: window.onebox.language()})]"

Outputs = dict[Component, object]


class Page(Layout):
    """Event handlers over one client, and the components they draw on."""

    def __init__(self, client: Client, chat: Chat) -> None:
        self._client = client
        self._chat = chat
        self._learnt = Learnt(client)
        self._tasks: tuple[TaskInfo, ...] = ()
        super().__init__()
        with self.blocks:
            self._wire(self.blocks)

    def _wire(self, blocks: gr.Blocks) -> None:
        loaded: list[Component] = [
            self.side, self.top, self.banner, self.hello, self.chatbot, self.box, self.task, self.send, self.stop,
            self.lang, self.current, self.shown, self.beacon, self.timer, self.notice,
        ]  # fmt: skip
        place: list[Component] = [self.current, self.lang, self.shown]
        blocks.load(
            self.load, [self.boot], loaded, js=BOOT_JS,
            show_progress="hidden", api_visibility="private", concurrency_limit=None,
        )  # fmt: skip
        self.timer.tick(
            self.tick, place, loaded, show_progress="hidden", api_visibility="private", concurrency_limit=None
        )
        # Gradio rebuilds every output of an update, also one left alone, so a stream has the fewest that do, and
        # hands them over as they are; what else changes is the script's (`begin`) and `finish`'s business.
        streamed: list[Component] = [self.chatbot, self.outcome]
        finish = ([*place, self.outcome, self.box], [*loaded, self.outcome])
        gr.on(
            [self.box.submit, self.send.click], self.on_send, [*place, self.box, self.task, self.key], streamed,
            js=BEGIN_SEND_JS,
            show_progress="hidden", api_visibility="private", concurrency_limit=None, postprocess=False,
        ).then(
            self.finish, *finish, show_progress="hidden", api_visibility="private", concurrency_limit=None
        )  # fmt: skip
        for event, ask in (
            (self.chatbot.retry, self.on_retry),
            (self.chatbot.edit, self.on_edit),
            (self.bridge.ask, self.on_ask),
        ):
            event(
                ask, place, streamed, js=BEGIN_JS,
                show_progress="hidden", api_visibility="private", concurrency_limit=None, postprocess=False,
            ).then(
                self.finish, *finish, show_progress="hidden", api_visibility="private", concurrency_limit=None
            )  # fmt: skip
        self.bridge.follow(
            self.on_follow, place, streamed, trigger_mode="multiple",
            show_progress="hidden", api_visibility="private", concurrency_limit=None, postprocess=False,
        ).then(
            self.finish, *finish, show_progress="hidden", api_visibility="private", concurrency_limit=None
        )  # fmt: skip
        self.bridge.act(
            self.on_act, place, loaded,
            show_progress="hidden", api_visibility="private", concurrency_limit=None, trigger_mode="multiple",
        )  # fmt: skip
        self.chatbot.like(
            self.on_like, place, [self.notice],
            show_progress="hidden", api_visibility="private", concurrency_limit=None, trigger_mode="multiple",
        )  # fmt: skip
        self.stop.click(
            self.on_stop, [self.current], None, js=HERE_JS,
            show_progress="hidden", api_visibility="private", queue=False, trigger_mode="multiple",
        )  # fmt: skip
        blocks.unload(self.on_leave)

    async def _box(self) -> Box:
        readiness = await self._client.readiness()
        try:
            self._tasks = tuple(await self._client.tasks())
            rows = (await self._client.conversations(limit=LIST_LENGTH)).data
            await self._learnt.look()
        except OneboxError:
            logger.info("The API cannot be read yet", exc_info=True)
            return Box(self._tasks, (), Readiness(False, readiness.store, readiness.engine))
        return Box(self._tasks, rows, readiness)

    async def load(self, boot: str, request: gr.Request) -> Outputs:
        """Draw everything: at load, and when the box has become ready."""
        try:
            wanted = Boot.model_validate_json(boot or "{}")
        except ValidationError:
            wanted = Boot()
        words = strings(pick_language(wanted.lang, request.headers.get("accept-language")))
        box = await self._box()
        return {**self._frame(box, words), **await self._open(wanted.c, words, {}, box)}

    async def tick(self, current: str, lang: str, shown: Mapping[str, int]) -> Outputs:
        """While the box is not ready: look again."""
        words = strings(lang)
        box = await self._box()
        if not box.readiness.ready:
            return {self.banner: render.banner(box.readiness, words)}
        return {
            self.banner: "",
            self.timer: gr.Timer(active=False),
            self.side: render.sidebar(box.rows, current or None, words),
            self.hello: gr.skip() if current else render.welcome(box.tasks, words),
            self.task: self._menu(words),
        }

    def _frame(self, box: Box, words: Strings) -> Outputs:
        return {
            self.banner: render.banner(box.readiness, words),
            self.timer: gr.Timer(active=not box.readiness.ready),
            self.lang: words.lang,
            self.box: gr.Textbox(placeholder=words.placeholder, label=words.message_label),
            self.send: words.send,
            self.stop: words.stop,
            self.task: self._menu(words),
        }

    def _menu(self, words: Strings) -> gr.HTML:
        titles = [[task.name, task_title(task.name, self._tasks, words)] for task in self._tasks]
        return gr.HTML(options=[["auto", words.auto], *titles], label=words.task_menu)

    async def _open(self, wanted: str | None, words: Strings, shown: Mapping[str, int], box: Box) -> Outputs:
        conversation: Conversation | None = None
        outputs: Outputs = {self.notice: ""}
        if wanted:
            try:
                conversation = await self._client.conversation(wanted)
            except UnknownConversation:
                outputs[self.notice] = render.notice(words.error_gone, words)
            except OneboxError as error:
                outputs[self.notice] = render.notice(render.friendly(error.code, words), words)
        return {**outputs, **self._opened(conversation, words, shown, box.rows)}

    def _opened(
        self,
        conversation: Conversation | None,
        words: Strings,
        shown: Mapping[str, int],
        rows: tuple[ConversationSummary, ...],
        live: Update | None = None,
        announce: str = "",
    ) -> Outputs:
        """The outputs that depend on which conversation is open."""
        current = conversation.id if conversation else None
        return {
            self.side: render.sidebar(rows, current, words),
            self.top: self._top(conversation, words),
            self.hello: "" if conversation else render.welcome(self._tasks, words),
            self.chatbot: self._drawn(conversation, words, shown, live),
            self.current: current or "",
            self.shown: dict(shown),
            self.beacon: render.beacon(conversation, words, announce, over=live is not None),
        }

    def _top(self, conversation: Conversation | None, words: Strings) -> str:
        title = conversation.title if conversation else None
        return render.topbar(title or "", words, self._learnt.learning)

    def _drawn(
        self, conversation: Conversation | None, words: Strings, shown: Mapping[str, int], live: Update | None = None
    ) -> gr.Chatbot:
        if conversation is None:
            return gr.Chatbot(value=[], feedback_value=[])
        thumbs: list[str | None] = []
        for turn in conversation.turns:
            variant = turn.variants[render.shown_variant(turn, shown)] if turn.variants else None
            thumb = variant.feedback if variant else None
            thumbs.append(thumb.capitalize() if thumb else None)
        value = render.messages(conversation, self._tasks, words, shown, live, self._learnt.labels)
        # Gradio's type of a message names no ready-made component parts, which it takes and which cost it less.
        return gr.Chatbot(value=cast(list[MessageDict | Message], value), feedback_value=thumbs)

    async def on_send(
        self, current: str, lang: str, shown: dict[str, int], text: str, task: str, key: str, request: gr.Request
    ) -> AsyncGenerator[Outputs, None]:
        """Send what is in the box. `key` is the browser's name for this message, however often it sends it."""
        words = strings(lang)
        text = text.strip()
        if not text:
            yield {self.outcome: Outcome(left=True)}
            return
        command = parse_command(text, self._tasks)
        if isinstance(command, UnknownCommand):
            known = ", ".join(f"/{name.name}" for name in self._tasks)
            yield self._unsent(text, words.unknown_command.format(name=command.name, known=known))
        elif isinstance(command, Command) and not command.text:
            yield self._unsent(text, words.empty_command.format(name=command.task))
        else:
            if isinstance(command, Command):
                text, task = command.text, command.task
            ask = Ask(current or None, text, model=task or "auto", key=key or uuid4().hex)
            async with aclosing(self._run(ask, words, shown, request)) as outputs:
                async for output in outputs:
                    yield output

    def _unsent(self, text: str, notice: str) -> Outputs:
        return {self.outcome: Outcome(restore=text, notice=notice)}

    async def on_retry(
        self, current: str, lang: str, shown: dict[str, int], request: gr.Request
    ) -> AsyncGenerator[Outputs, None]:
        """Answer the last turn again."""
        async with aclosing(self._again(current, "auto", strings(lang), shown, request)) as outputs:
            async for output in outputs:
                yield output

    async def on_ask(
        self, current: str, lang: str, shown: dict[str, int], request: gr.Request, event: gr.EventData
    ) -> AsyncGenerator[Outputs, None]:
        """Answer the last turn again, as another task if one was picked on the chip."""
        task = str(event.task) if event.ob == "route" else "auto"
        async with aclosing(self._again(current, task, strings(lang), shown, request)) as outputs:
            async for output in outputs:
                yield output

    async def on_edit(
        self, current: str, lang: str, shown: dict[str, int], request: gr.Request, event: gr.EditData
    ) -> AsyncGenerator[Outputs, None]:
        """Replace a message of the visitor's and what came after it."""
        words = strings(lang)
        number = _message_number(event.index) // 2
        text = _plain(event.value).strip()
        try:
            turns = (await self._client.conversation(current)).turns
        except OneboxError as error:
            yield self._unsent("", render.friendly(error.code, words))
            return
        if not text or number >= len(turns):
            return
        ask = Ask(current, text, edit=turns[number].id)
        async with aclosing(self._run(ask, words, shown, request)) as outputs:
            async for output in outputs:
                yield output

    async def _again(
        self, current: str, model: str, words: Strings, shown: dict[str, int], request: gr.Request
    ) -> AsyncGenerator[Outputs, None]:
        if current:
            ask = Ask(current, model=model, regenerate=True)
            async with aclosing(self._run(ask, words, shown, request)) as outputs:
                async for output in outputs:
                    yield output

    async def on_follow(
        self, current: str, lang: str, shown: dict[str, int], request: gr.Request, event: gr.EventData
    ) -> AsyncGenerator[Outputs, None]:
        """Draw the reply that is being written in a conversation, whoever asked for it."""
        updates = self._chat.watch(request.session_hash or "", str(event.c))
        async with aclosing(self._draw(updates, "", strings(lang), shown)) as outputs:
            async for output in outputs:
                yield output

    async def _run(
        self, ask: Ask, words: Strings, shown: dict[str, int], request: gr.Request
    ) -> AsyncGenerator[Outputs, None]:
        updates = self._chat.answer(request.session_hash or "", ask)
        async with aclosing(self._draw(updates, ask.text, words, shown)) as outputs:
            async for output in outputs:
                yield output

    async def _draw(
        self, updates: AsyncGenerator[Update, None], text: str, words: Strings, shown: dict[str, int]
    ) -> AsyncGenerator[Outputs, None]:
        """The updates as outputs; `text` is what the visitor wrote."""
        left = True
        async with aclosing(updates):
            async for update in updates:
                outputs: Outputs = {}
                left = update.running
                conversation = update.conversation
                if conversation and conversation.turns:
                    shown = {key: value for key, value in shown.items() if key != conversation.turns[-1].id}
                if conversation is not None:
                    drawn = render.messages(conversation, self._tasks, words, shown, update, self._learnt.labels)
                    outputs[self.chatbot] = drawn
                elif update.waiting_s is not None:
                    outputs[self.chatbot] = render.pending(text, update, words)
                if not update.running:
                    notice = words.waiting_stopped if update.unsent else ""
                    if update.problem is not None:
                        notice = render.friendly(update.problem.code, words)
                    outputs[self.outcome] = Outcome(update, text if update.unsent else "", notice)
                if outputs:
                    yield outputs
        if left:
            yield {self.outcome: Outcome(left=True)}

    async def finish(
        self, current: str, lang: str, shown: dict[str, int], outcome: Outcome | None, typed: str
    ) -> Outputs:
        """After an exchange: draw what is not part of the conversation itself. `typed` came into the box meanwhile."""
        words = strings(lang)
        outcome = outcome or Outcome()
        if outcome.left:
            return {self.outcome: None}
        update = outcome.update
        outputs: Outputs = {
            self.notice: render.notice(outcome.notice, words) if outcome.notice else "",
            self.outcome: None,
        }
        if outcome.restore:
            outputs[self.box] = f"{outcome.restore}\n\n{typed}" if typed.strip() else outcome.restore
        conversation = update.conversation if update else None
        if update is None or conversation is None or update.problem is not None or update.unsent:
            box = Box(self._tasks, await self._rows(), Readiness(True, "ok", "ready"))
            wanted = conversation.id if conversation else current
            return {**await self._open(wanted or None, words, shown, box), **outputs}
        last = conversation.turns[-1]
        state = last.variants[-1].state if last.variants else "stopped"
        announce = {"failed": words.announce_failed, "stopped": words.announce_stopped}.get(state, words.announce_done)
        shown = {key: value for key, value in shown.items() if key != last.id}
        return {**outputs, **self._opened(conversation, words, shown, await self._rows(), update, announce)}

    async def _rows(self) -> tuple[ConversationSummary, ...]:
        await self._learnt.look()
        try:
            return (await self._client.conversations(limit=LIST_LENGTH)).data
        except OneboxError:
            logger.info("The list of conversations cannot be read", exc_info=True)
            return ()

    async def on_act(
        self, current: str, lang: str, shown: dict[str, int], request: gr.Request, event: gr.EventData
    ) -> Outputs:
        """What the sidebar and the arrows between variants ask for."""
        words, session = strings(lang), request.session_hash or ""
        current = str(event.c)
        try:
            match event.ob:
                case "variant":
                    shown = {**shown, str(event.turn): int(event.to)}
                    conversation = await self._client.conversation(current)
                    return {self.chatbot: self._drawn(conversation, words, shown), self.shown: shown}
                case "language":
                    words = strings(str(event.lang))
                    box = await self._box()
                    return {**self._frame(box, words), **await self._open(current, words, shown, box)}
                case "plan":
                    await self._client.replan(str(event.run), str(event.plan).split(","))
                    return {self.notice: ""}
                case "learning":
                    await self._learnt.choose(on=event.to != "off")
                    opened = await self._client.conversation(current) if current else None
                    return {self.top: self._top(opened, words), self.notice: ""}
                case "unlearn":
                    await self._learnt.undo(str(event.id))
                    return {self.chatbot: self._drawn(await self._client.conversation(current), words, shown)}
                case "rename":
                    await self._client.rename_conversation(str(event.id), str(event.title).strip() or words.untitled)
                case "delete":
                    await self._client.delete_conversation(str(event.id))
                    if current == event.id:
                        self._chat.leave(session)
                        current = ""
                case "open":
                    self._chat.leave(session)
                    current = str(event.id)
                case "new":
                    self._chat.leave(session)
                    current = ""
        except OneboxError as error:
            return {self.notice: render.notice(render.friendly(error.code, words), words)}
        box = Box(self._tasks, await self._rows(), Readiness(True, "ok", "ready"))
        return await self._open(current, words, {}, box)

    async def on_like(self, current: str, lang: str, shown: dict[str, int], event: gr.LikeData) -> Outputs:
        """Store a thumb."""
        words = strings(lang)
        try:
            turn = (await self._client.conversation(current)).turns[_message_number(event.index) // 2]
            variant = turn.variants[render.shown_variant(turn, shown)]
            await self._client.feedback(current, variant.run_id, RATINGS.get(event.liked))
        except OneboxError as error:
            return {self.notice: render.notice(render.friendly(error.code, words), words)}
        return {self.notice: ""}

    async def on_stop(self, current: str, request: gr.Request) -> None:
        """End the reply; whoever follows it draws its end."""
        try:
            await self._chat.stop(request.session_hash or "", current or None)
        except OneboxError:
            logger.warning("A reply could not be stopped", exc_info=True)

    def on_leave(self, request: gr.Request) -> None:
        """The browser is gone: nobody reads the stream any more, and what Gradio keeps of the session is of no use."""
        session = request.session_hash or ""
        self._chat.leave(session)
        self.blocks.state_holder.session_data.pop(session, None)
        self.blocks.state_holder.time_last_used.pop(session, None)


def _message_number(index: int | tuple[int, int]) -> int:
    return index if isinstance(index, int) else index[0]


def _plain(value: object) -> str:
    """The text of an edited message, whichever of Gradio's shapes it comes in."""
    if isinstance(value, list):
        return "\n".join(_plain(part) for part in value)
    if isinstance(value, dict):
        return str(value.get("text") or value.get("content") or "")
    return str(value)
