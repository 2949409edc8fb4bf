"""What the page shows of a decision: the task and how sure it is, the others to choose from, the steps of a plan.

Every value put into markup is escaped.
"""

from collections.abc import Sequence
from html import escape
from typing import Final

from onebox.labels import Learning
from onebox.plans import steps_of
from onebox.records import TaskInfo, Turn, Variant
from ui.reply import PENDING, Update
from ui.strings import Strings

AROUND: Final = 24  # characters shown around the words that decided
ASKED: Final = 2  # other tasks offered where the router was not sure


def attributes(**values: str) -> str:
    """Escaped `data-*` attributes."""
    return " ".join(f'data-{name.replace("_", "-")}="{escape(value)}"' for name, value in values.items())


def task_title(name: str, tasks: Sequence[TaskInfo], words: Strings) -> str:
    """The task's name in the page's language."""
    found = next((task.title for task in tasks if task.name == name), {})
    return found.get(words.lang) or found.get("en") or name


def chip(turn: Turn, index: int, tasks: Sequence[TaskInfo], words: Strings, conversation: str | None) -> str:
    """Task and certainty of a reply, its other tasks and its variants."""
    variant, last = turn.variants[index], conversation is not None
    here = f" {attributes(c=conversation)}" if conversation else ""
    name = _chip_name(variant, tasks, words)
    parts: list[str] = []
    unsure = bool(variant.route and variant.route.ask)
    mark = f'<span class="ob-unsure" title="{escape(words.unsure)}">?</span>' if unsure else ""
    if last and turn.id != PENDING and tasks and variant.state != "running":
        rows = "".join(_other_task(variant, task, words) for task in tasks) + _why(turn.user, variant, words)
        parts.append(
            f'<details class="ob-chip"><summary title="{escape(words.chip_hint)}">{escape(name)}{mark}</summary>'
            f'<div class="ob-menu"><p>{escape(words.chip_again)}</p>{rows}</div></details>'
        )
        if unsure:
            parts.append(_ask_back(variant, tasks, words))
    elif name:
        parts.append(f'<span class="ob-chip"><span class="ob-pill">{escape(name)}{mark}</span></span>')
    total = len(turn.variants)
    if total > 1:
        parts.append(
            '<span class="ob-variants">'
            f"{_variant_button(turn, index - 1, total, words.previous_variant, '‹')}"
            f"<span>{escape(words.variant.format(number=index + 1, total=total))}</span>"
            f"{_variant_button(turn, index + 1, total, words.next_variant, '›')}</span>"
        )
    return f'<div class="ob-chips"{here}>{"".join(parts)}</div>'


def _chip_name(variant: Variant, tasks: Sequence[TaskInfo], words: Strings) -> str:
    route = variant.route
    if route is None:
        return task_title(variant.task, tasks, words) if variant.task else words.raw
    name = " → ".join(task_title(step, tasks, words) for step in (route.plan or (route.task,)))
    if route.tier == "explicit":
        return f"{name} · {words.chip_chosen}"
    # The probabilities are those of single tasks; a chain has none of its own.
    share = route.probabilities.get(route.task) if len(route.plan) < 2 else None
    return name if share is None else f"{name} · {_percent(share)}"


def plan(variant: Variant, tasks: Sequence[TaskInfo], words: Strings, live: Update | None) -> str:
    """The steps, with the words that asked for each; those that have not begun can be taken out or moved up."""
    assert variant.route is not None, "a plan comes with a route"
    steps = steps_of(variant.route)
    names = [step.task for step in steps]
    running = live is not None and live.running
    at = live.step if live is not None and running else len(steps) if variant.state == "completed" else -1
    rows = []
    for index, step in enumerate(steps):
        state = "done" if index < at else "now" if index == at else "next"
        buttons = ""
        if running and index > at:
            less = [*names[:index], *names[index + 1 :]]
            buttons = _edit_plan(variant, less, words.plan_remove, "×")
            if index - 1 > at:
                swapped = [*names[: index - 1], names[index], names[index - 1], *names[index + 1 :]]
                buttons = _edit_plan(variant, swapped, words.plan_up, "↑") + buttons
        said = f"<q>{escape(step.words)}</q>" if step.words else ""
        title = escape(task_title(step.task, tasks, words))
        rows.append(f'<li class="{state}"><b>{title}</b>{said}{buttons}</li>')
    return f'<ol class="ob-plan" aria-label="{escape(words.plan)}">{"".join(rows)}</ol>'


def noted(label_id: str, words: Strings) -> str:
    """That the visitor's correction of this decision was noted, and the way to undo that."""
    undo = f'<button type="button" {attributes(ob="unlearn", id=label_id)}>{escape(words.noted_undo)}</button>'
    return f'<p class="ob-noted">{escape(words.noted)} {undo}</p>'


def learning_box(learning: Learning | None, words: Strings) -> str:
    """The box to tick for learning from corrections; nothing where it is not known what is chosen."""
    if learning is None:
        return ""
    on = learning != "off"
    data = attributes(ob="learning", to="off" if on else "on")
    return (
        f'<button type="button" role="checkbox" aria-checked="{str(on).lower()}" class="ob-quiet ob-learn" '
        f'title="{escape(words.learn_hint)}" aria-label="{escape(words.learn)}" {data}>'
        f'<i aria-hidden="true"></i><span>{escape(words.learn)}</span></button>'
    )


def _edit_plan(variant: Variant, plan: Sequence[str], label: str, sign: str) -> str:
    data = attributes(ob="plan", run=variant.run_id, plan=",".join(plan))
    return f'<button type="button" title="{escape(label)}" aria-label="{escape(label)}" {data}>{sign}</button>'


def _percent(share: float) -> str:
    """Never a full 100 %: a router is not that sure of anything."""
    return "> 99 %" if share >= 0.995 else f"{100 * share:.0f} %"


def _why(text: str, variant: Variant, words: Strings) -> str:
    """The words of the message that decided, each with a little around it."""
    cues = sorted(variant.route.cues, key=lambda cue: cue.start) if variant.route else []
    cues = [cue for cue in cues if text[cue.start : cue.end] == cue.text]
    if not cues:
        return ""
    pieces, at = [], 0
    for cue in cues:
        start = max(cue.start - AROUND, at)
        pieces.append(f"{'… ' if start > at else ''}{escape(text[start : cue.start])}<mark>{escape(cue.text)}</mark>")
        at = cue.end
    rest = escape(text[at : at + AROUND]) + (" …" if len(text) > at + AROUND else "")
    return f'<p class="ob-why">{escape(words.chip_why)}</p><p class="ob-cues">{"".join(pieces)}{rest}</p>'


def _ask_back(variant: Variant, tasks: Sequence[TaskInfo], words: Strings) -> str:
    """The likeliest other tasks as buttons, where the router was not sure."""
    shares = variant.route.probabilities if variant.route else {}
    known = {task.name: task for task in tasks}
    others = sorted((name for name in shares if name in known and name != variant.task), key=lambda name: -shares[name])
    buttons = "".join(
        f'<button type="button" {attributes(ob="route", task=name)}>'
        f"{escape(task_title(name, (known[name],), words))}</button>"
        for name in others[:ASKED]
    )
    return f'<span class="ob-ask">{escape(words.ask_back)} {buttons}</span>' if buttons else ""


def _other_task(variant: Variant, task: TaskInfo, words: Strings) -> str:
    title = task_title(task.name, (task,), words)
    share = variant.route.probabilities.get(task.name) if variant.route else None
    right = f"<span>{escape(_percent(share))}</span>" if share is not None else ""
    current = ' aria-current="true"' if task.name == variant.task else ""
    return f'<button type="button" {attributes(ob="route", task=task.name)}{current}>{escape(title)}{right}</button>'


def _variant_button(turn: Turn, to: int, total: int, label: str, sign: str) -> str:
    off = "" if 0 <= to < total else " disabled"
    return (
        f'<button type="button" aria-label="{escape(label)}"{off} '
        f"{attributes(ob='variant', turn=turn.id, to=str(to))}>{sign}</button>"
    )
