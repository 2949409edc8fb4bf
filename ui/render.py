"""Conversations as what Gradio shows: chatbot messages and the page's own markup.

Text of models goes only into chatbot text parts, which Gradio sanitizes; every value put into markup here is escaped.
"""

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal, TypedDict

from onebox.events import Check, Queued, Stopped
from onebox.labels import Learning
from onebox.records import Conversation, ConversationSummary, Problem, Readiness, TaskInfo, Turn
from ui.decision import attributes, chip, learning_box, noted, plan, task_title
from ui.reply import Update, running_variant
from ui.strings import Strings

STARTERS = 4


class TextPart(TypedDict):
    """Markdown, sanitized in the browser."""

    type: Literal["text"]
    text: str


class HtmlPart(TypedDict):
    """The page's own markup inside a message."""

    type: Literal["component"]
    component: Literal["html"]
    value: str
    constructor_args: dict[str, object]
    props: dict[str, object]


class ChatMessage(TypedDict):
    """One message of `gr.Chatbot`."""

    role: Literal["user", "assistant"]
    content: list[TextPart | HtmlPart]
    metadata: None
    options: None


def shown_variant(turn: Turn, shown: Mapping[str, int]) -> int:
    """Index of the variant on display: the one picked with the arrows, else the one that counts."""
    return max(0, min(shown.get(turn.id, turn.chosen), len(turn.variants) - 1))


def messages(
    conversation: Conversation,
    tasks: Sequence[TaskInfo],
    words: Strings,
    shown: Mapping[str, int],
    live: Update | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[ChatMessage]:
    """Two messages per turn: message 2i is the user's of turn i, 2i+1 the answer on display.

    `live` adds what only the running exchange knows to the last turn; `labels` maps runs that were corrected to the
    labels made of that.
    """
    result: list[ChatMessage] = []
    for number, turn in enumerate(conversation.turns):
        last = number == len(conversation.turns) - 1
        result.append(_message("user", [_text(turn.user)]))
        index = shown_variant(turn, shown)
        if turn.variants:
            content = _answer(turn, index, tasks, words, live if last else None, conversation.id if last else None)
            if label := (labels or {}).get(turn.variants[index].run_id):
                content.insert(1, _html(noted(label, words)))
        else:
            content = list[TextPart | HtmlPart]([_html(_note(words.stopped))])
        result.append(_message("assistant", content))
    return result


def pending(text: str, update: Update, words: Strings) -> list[ChatMessage]:
    """A message whose conversation cannot be had yet."""
    return [_message("user", [_text(text)]), _message("assistant", [_html(_waiting(update, words))])]


def _message(role: Literal["user", "assistant"], content: list[TextPart | HtmlPart]) -> ChatMessage:
    return {"role": role, "content": content, "metadata": None, "options": None}


def _answer(
    turn: Turn, index: int, tasks: Sequence[TaskInfo], words: Strings, live: Update | None, conversation: str | None
) -> list[TextPart | HtmlPart]:
    """`conversation` is given for the last turn, whose answer tells the script where it belongs."""
    variant, last = turn.variants[index], conversation is not None
    content: list[TextPart | HtmlPart] = []
    if variant.route is not None or variant.task or len(turn.variants) > 1:
        content.append(_html(chip(turn, index, tasks, words, conversation)))
    elif variant.text and conversation is not None:
        content.append(_html(f"<span {attributes(c=conversation)}></span>"))
    if variant.route is not None and len(variant.route.plan) > 1:
        content.append(_html(plan(variant, tasks, words, live)))
    if variant.text:
        content.append(_text(variant.text))
    running = variant.state == "running" or (live is not None and live.running)
    if variant.state == "running" and not variant.text:
        content.append(_html(_waiting(live, words, conversation)))
    elif variant.state == "stopped":
        content.append(_html(_note(_stopped(variant.receipt, words))))
    elif variant.state == "failed":
        content.append(_html(problem(variant.error or Problem("internal_error", ""), words, retry=last)))
    if live is not None and not running:
        if live.cut:
            content.append(_html(_note(words.cut)))
        if live.checks:
            content.append(_html(_checks(live.checks, words)))
    if variant.text and not running:
        content.append(_html(_copy(variant.text, words)))
    return content or [_html(_note(words.stopped))]


def _text(text: str) -> TextPart:
    return {"type": "text", "text": text}


def _html(markup: str) -> HtmlPart:
    props: dict[str, object] = {"html_template": "${value}", "css_template": "", "js_on_load": None, "padding": False}
    return {
        "type": "component",
        "component": "html",
        "value": markup,
        "constructor_args": props,
        "props": {**props, "value": markup, "apply_default_css": False},
    }


def _copy(text: str, words: Strings) -> str:
    """Gradio offers its own copy button for messages of text alone."""
    shapes = '<rect x="5" y="5" width="9" height="9" rx="2"/><path d="M11 2H4a2 2 0 0 0-2 2v7"/>'
    return (
        f'<div class="ob-foot"><button type="button" {attributes(ob_local="copy", text=text)} '
        f'title="{escape(words.copy)}" aria-label="{escape(words.copy)}">'
        f'<svg viewBox="0 0 16 16">{shapes}</svg></button></div>'
    )


def _stopped(receipt: Stopped | None, words: Strings) -> str:
    if receipt is None:
        return words.stopped
    if receipt.slot_freed_ms is None:
        return words.stopped_after.format(tokens=receipt.tokens)
    return words.stopped_receipt.format(tokens=receipt.tokens, ms=round(receipt.slot_freed_ms))


def _note(text: str) -> str:
    return f'<p class="ob-note">{escape(text)}</p>'


def _waiting(live: Update | None, words: Strings, conversation: str | None = None) -> str:
    here = f" {attributes(c=conversation)}" if conversation else ""
    progress = live.progress if live else None
    if live is not None and live.waiting_s is not None:
        label = words.waiting.format(seconds=live.waiting_s)
    elif live is not None and live.queued is not None:
        label = _queued(live.queued, words)
    elif progress is not None:
        label = words.progress.format(label=progress.label, done=progress.done, total=progress.total)
    else:
        return (
            f'<p class="ob-wait"{here}><span class="ob-dots" aria-hidden="true"><i></i><i></i><i></i></span>'
            f'<span class="ob-sr">{escape(words.thinking)}</span></p>'
        )
    share = 100 * progress.done / progress.total if progress and progress.total else 0
    bar = f'<span class="ob-bar"><i style="width:{share:.0f}%"></i></span>' if progress else ""
    return (
        f'<p class="ob-wait"{here}><span class="ob-dots" aria-hidden="true"><i></i><i></i><i></i></span>'
        f"<span>{escape(label)}</span></p>{bar}"
    )


def _queued(queued: Queued, words: Strings) -> str:
    if queued.wait_s is None:
        return words.queued.format(position=queued.position)
    return words.queued_for.format(position=queued.position, seconds=max(1, round(queued.wait_s)))


def _checks(checks: Sequence[Check], words: Strings) -> str:
    rows = "".join(
        f'<li class="{"ok" if check.passed else "bad"}" title="{escape(check.detail)}">'
        f'<span class="ob-sr">{escape(words.check_passed if check.passed else words.check_failed)}: </span>'
        f"{escape(check.name)}</li>"
        for check in checks
    )
    return f'<ul class="ob-checks">{rows}</ul>'


def friendly(code: str, words: Strings) -> str:
    """What happened, why and what to do, for people."""
    return {
        "overloaded": words.error_overloaded,
        "rate_limited": words.error_rate_limited,
        "context_length_exceeded": words.error_too_long,
        "body_too_large": words.error_too_long,
        "engine_failed": words.error_engine,
        "timeout": words.error_timeout,
        "unavailable": words.error_unavailable,
        "model_loading": words.error_unavailable,
        "store_unavailable": words.error_unavailable,
        "conversation_not_found": words.error_gone,
        "conflict": words.error_conflict,
        "invalid_api_key": words.error_key,
    }.get(code, words.error_other)


def problem(what: Problem, words: Strings, *, retry: bool) -> str:
    """An error box; the API's own words are behind "details"."""
    again = f'<button type="button" {attributes(ob="retry")}>{escape(words.retry)}</button>' if retry else ""
    details = (
        f"<details><summary>{escape(words.details)}</summary><p>{escape(what.message)}</p></details>"
        if what.message
        else ""
    )
    return f'<div class="ob-problem"><p>{escape(friendly(what.code, words))}</p>{again}{details}</div>'


def notice(text: str, words: Strings) -> str:
    """A line above the box, until dismissed or the next message."""
    return (
        f'<div class="ob-notice" role="status"><p>{escape(text)}</p><button type="button" '
        f'aria-label="{escape(words.dismiss)}" {attributes(ob_local="dismiss")}>×</button></div>'
    )


def banner(readiness: Readiness, words: Strings) -> str:
    """What keeps the box from answering now; empty when it is ready."""
    if readiness.ready:
        return ""
    loading = readiness.engine == "loading"
    title, hint = (words.loading_banner, words.loading_hint) if loading else (words.down_banner, words.down_hint)
    return f'<div class="ob-banner" role="status"><b>{escape(title)}</b><span>{escape(hint)}</span></div>'


def welcome(tasks: Sequence[TaskInfo], words: Strings) -> str:
    """The greeting of an empty conversation, with starters from the tasks' examples in the page's language."""
    cards: list[str] = []
    for task in tasks:
        example = next((example.text for example in task.examples if example.lang == words.lang), None)
        if example and len(cards) < STARTERS:
            cards.append(
                f'<button type="button" {attributes(ob_local="starter", text=example)}>'
                f"<b>{escape(task_title(task.name, tasks, words))}</b><span>{escape(example)}</span></button>"
            )
    return (
        f'<div class="ob-welcome"><h1>{escape(words.greeting)}</h1><p>{escape(words.greeting_hint)}</p>'
        f'<div class="ob-starters">{"".join(cards)}</div></div>'
    )


def sidebar(rows: Sequence[ConversationSummary], current: str | None, words: Strings) -> str:
    """The list of conversations."""
    items = "".join(_sidebar_row(row, row.id == current, words) for row in rows)
    listing = f"<ul>{items}</ul>" if items else f'<p class="ob-empty">{escape(words.no_chats)}</p>'
    return (
        '<div class="ob-brand"><span class="ob-logo" aria-hidden="true"></span><b>Onebox</b>'
        f'<button type="button" class="ob-icon ob-close" {attributes(ob_local="sidebar")} '
        f'aria-label="{escape(words.close_sidebar)}">×</button></div>'
        f'<button type="button" class="ob-new" {attributes(ob="new")}><span aria-hidden="true">+</span>'
        f"{escape(words.new_chat)}</button>"
        f'<nav aria-label="{escape(words.chats)}"><h2>{escape(words.chats)}</h2>{listing}</nav>'
    )


def _sidebar_row(row: ConversationSummary, current: bool, words: Strings) -> str:
    title = row.title or words.untitled
    here = ' aria-current="page"' if current else ""
    which = attributes(id=row.id)
    return (
        f'<li {which}><button type="button" class="ob-open" {attributes(ob="open", id=row.id)}{here} '
        f'title="{escape(title)}">{escape(title)}</button><details class="ob-more">'
        f'<summary aria-label="{escape(words.more.format(title=title))}">⋯</summary><div class="ob-menu">'
        f'<button type="button" {attributes(ob_local="rename", id=row.id)}>{escape(words.rename)}</button>'
        f'<a href="export/{escape(row.id)}?format=markdown" download>{escape(words.export_markdown)}</a>'
        f'<a href="export/{escape(row.id)}?format=json" download>{escape(words.export_json)}</a>'
        f'<button type="button" class="ob-danger" {attributes(ob_local="delete", id=row.id)} '
        f'data-confirm="{escape(words.delete_confirm)}">{escape(words.delete)}</button></div></details></li>'
    )


def topbar(title: str, words: Strings, learning: Learning | None = None) -> str:
    """Title of the conversation, learning, language and theme."""
    other = "en" if words.lang == "zh" else "zh"
    return (
        f'<div class="ob-top"><button type="button" class="ob-icon ob-burger" {attributes(ob_local="sidebar")} '
        f'aria-label="{escape(words.open_sidebar)}">☰</button><span class="ob-title">{escape(title)}</span>'
        f"{learning_box(learning, words)}"
        f'<button type="button" class="ob-quiet" lang="{other}" {attributes(ob_local="language", lang=other)}>'
        f"{escape(words.other_language)}</button>"
        f'<button type="button" class="ob-icon" {attributes(ob_local="theme")} '
        f'aria-label="{escape(words.theme)}" title="{escape(words.theme)}">◐</button></div>'
    )


def beacon(conversation: Conversation | None, words: Strings, announce: str = "", *, over: bool = False) -> str:
    """What the page's script has to know: the conversation for the address bar, whether a reply in it is to be
    followed, the language, what to announce. `over`: whatever its record says, nothing is to be followed."""
    running = conversation is not None and not over and running_variant(conversation) is not None
    state = "running" if running else "idle"
    marks = attributes(
        c=conversation.id if conversation else "",
        turns=str(len(conversation.turns)) if conversation else "0",
        state=state,
        lang=words.html_lang,
        announce=announce,
        chat_label=words.chat_label,
        copied=words.copied,
        away=words.page_away,
        stamp=str(time.monotonic_ns()),
    )
    return f"<span {marks}></span>"
