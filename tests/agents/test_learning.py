"""Learning from corrections: a habit is picked up at once, nothing else is harmed, and harm is refused."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from agents.golden import golden
from agents.labelled import GOLDEN, HABITS, HELD_OUT, Labelled, read_labelled, read_records
from agents.learning import Learned, features_of
from agents.reader.plans import TASKS
from agents.reader.reader import Reading, shared_reader
from agents.router import Router
from onebox.labels import Label
from onebox.messages import Message, user


def habit(name: str) -> list[Labelled]:
    records = read_records(HABITS)
    return [item for item, record in zip(read_labelled([HABITS]), records, strict=True) if record["habit"] == name]


def label(number: int, item: Labelled, was: tuple[str, ...] = ("qa",)) -> Label:
    return Label(f"label_{number}", float(number), "reroute", item.messages, item.plan, was)


@cache
def read(messages: tuple[Message, ...]) -> Reading:
    return shared_reader().read(messages)


def right(items: list[Labelled], learned: Learned, tenant: str) -> float:
    readings = [learned.taught(read(item.messages), tenant) for item in items]
    return float(np.mean([one.task == item.task for one, item in zip(readings, items, strict=True)]))


@pytest.mark.parametrize("name", ["zh-tidy", "en-actions", "zh-terms", "en-estimate"])
def test_forty_corrections_of_a_habit_raise_it_and_harm_nothing_else(name: str) -> None:
    items, others = habit(name), read_labelled([HELD_OUT])
    learned, reasons = Learned.of((), {"a": [label(number, item) for number, item in enumerate(items[:40])]})
    assert len(reasons) <= 25  # of forty
    nothing = Learned()
    assert right(items[40:], learned, "a") >= right(items[40:], nothing, "a") + 0.03
    assert right(others, learned, "a") >= right(others, nothing, "a") - 0.01


def test_what_one_tenant_teaches_is_not_what_another_gets() -> None:
    items = habit("zh-terms")
    labels = [label(number, item) for number, item in enumerate(items[:40])]
    learned, _ = Learned.of((), {"a": labels})
    assert right(items[40:], learned, "b") == right(items[40:], Learned(), "b")
    shared, _ = Learned.of(labels, {})
    assert right(items[40:], shared, "b") == pytest.approx(right(items[40:], learned, "a"), abs=0.05)


def test_labels_that_would_harm_other_messages_are_not_used_and_say_so() -> None:
    """Somebody says "chat" to whatever is asked, the golden messages among it."""
    asked = [item for item in read_labelled([GOLDEN]) if item.task in {"qa", "reason", "translate", "write"}]
    wrong = [Label(f"label_{n}", float(n), "api", item.messages, ("chat",)) for n, item in enumerate(asked)]
    learned, reasons = Learned.of(wrong, {})
    assert len(reasons) > 0.1 * len(wrong)
    assert all("golden" in reason for reason in reasons.values())
    assert right(read_labelled([GOLDEN]), learned, "") >= right(read_labelled([GOLDEN]), Learned(), "") - 0.006


def test_bad_labels_take_few_of_the_good_ones_with_them() -> None:
    asked = [item for item in read_labelled([GOLDEN]) if item.task in {"qa", "reason", "translate", "write"}]
    wrong = [Label(f"wrong_{n}", float(n), "api", item.messages, ("chat",)) for n, item in enumerate(asked)]
    items = habit("zh-terms")
    good = [label(1000 + number, item) for number, item in enumerate(items[:40])]
    learned, reasons = Learned.of((), {"a": [*wrong, *good]})
    assert sum(one.id in reasons for one in good) <= 20
    assert any(one.id in reasons for one in wrong)
    assert right(items[40:], learned, "a") >= right(items[40:], Learned(), "a") + 0.03


def test_bad_labels_that_others_share_leave_most_of_a_tenants_own_in_use() -> None:
    items = habit("zh-terms")
    own = [label(number, item) for number, item in enumerate(items[:40])]
    asked = [item for item in read_labelled([GOLDEN]) if item.task in {"qa", "reason", "translate", "write"}]
    wrong = [Label(f"wrong_{n}", 100.0 + n, "api", item.messages, ("chat",)) for n, item in enumerate(asked)]
    learned, reasons = Learned.of(wrong, {"a": own})
    assert len({one.id for one in own} & set(reasons)) <= 15
    assert right(items[40:], learned, "a") >= right(items[40:], Learned(), "a") + 0.1


def test_tenant_whose_labels_stay_as_they_are_is_not_taught_again() -> None:
    items = habit("zh-terms")
    labels = [label(number, item) for number, item in enumerate(items[:10])]
    first, _ = Learned.of((), {"a": labels})
    again, _ = Learned.of((), {"a": labels, "b": labels[:5]})
    assert first._own["a"] is again._own["a"]


def test_label_of_a_plugin_is_not_the_heads_to_learn() -> None:
    item = habit("zh-terms")[0]
    learned, reasons = Learned.of([Label("label_1", 1.0, "api", item.messages, ("rhyme",))], {})
    assert "plugin" in reasons["label_1"]
    assert right([item], learned, "") == right([item], Learned(), "")


async def test_corrected_plan_is_taken_over_for_the_same_message() -> None:
    router = Router()
    text = "Notes of the harbour meeting, you know what to do: the crane is late, the pier is closed, Ann pays."
    before = await router.route([user(text)])
    plan = (before.plan[0], "translate") if before.plan[0] != "translate" else ("translate", "write")
    await router.learn([], {"a": [Label("label_1", 1.0, "plan", (user(text),), plan, before.plan)]})
    assert (await router.route([user(text)], tenant="a")).plan == plan
    assert (await router.route([user(text)], tenant="b")).plan == before.plan
    await router.learn([], {})
    assert (await router.route([user(text)], tenant="a")).plan == before.plan


async def test_label_that_does_not_say_what_was_decided_may_take_a_step_away() -> None:
    router = Router()
    text = "Summarise these notes, then put the summary into French: the crane is late, the pier is closed, Ann pays."
    before = await router.route([user(text)])
    assert len(before.plan) > 1
    await router.learn([], {"a": [Label("label_1", 1.0, "api", (user(text),), before.plan[:1])]})
    assert (await router.route([user(text)], tenant="a")).plan == before.plan[:1]


def test_corrected_plan_leaves_nothing_open_for_the_engine_to_decide() -> None:
    (message,) = habit("zh-terms")[0].messages
    learned, _ = Learned.of((), {"a": [Label("label_1", 1.0, "plan", (message,), ("translate", "write"), ("qa",))]})
    reading = learned.taught(shared_reader().read([message]), "a")
    if reading.task == "translate":
        assert (reading.plan, reading.chain, reading.several) == (("translate", "write"),) * 2 + (1.0,)


def test_golden_messages_are_those_of_every_task() -> None:
    assert set(Counter(golden().tasks.tolist())) == set(range(len(TASKS)))


def test_features_of_a_message_are_its_state_and_its_words() -> None:
    vector = shared_reader().read([user("整理一下")]).vector
    one, other = features_of(vector, "整理一下会议记录"), features_of(vector, "a reply to my landlord")
    assert np.linalg.norm(one - other) > 1
    assert np.allclose(one[: len(vector)], other[: len(vector)])
