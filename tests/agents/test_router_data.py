"""What is asked of the data behind the router, and of what it says about itself."""

import json

import pytest

from agents.labelled import BOUNDARY, GOLDEN, GOLDEN_PLANS, HABITS, HELD_OUT, read_labelled, training_data
from agents.reader.plans import TASKS
from agents.reader.reader import QUALITY, shared_reader
from agents.scoring import expected_calibration_error
from agents.train_router import quality


def test_neither_language_nor_length_nor_first_character_tells_the_task() -> None:
    items = training_data()
    for key in (
        lambda item: item.lang,
        lambda item: len(item.messages[-1].text).bit_length(),
        lambda item: (item.lang, item.messages[-1].text[:1].lower()),
    ):
        groups: dict[object, list[str]] = {}
        for item in items:
            groups.setdefault(key(item), []).append(item.task)
        guessed = sum(max(tasks.count(task) for task in TASKS) for tasks in groups.values() if len(tasks) > 4)
        seen = sum(len(tasks) for tasks in groups.values() if len(tasks) > 4)
        assert guessed / seen < 0.5


def test_there_is_data_for_every_language_and_enough_of_it() -> None:
    items = training_data()
    share = {lang: sum(item.lang == lang for item in items) / len(items) for lang in {item.lang for item in items}}
    assert len(items) >= 3000
    assert share["zh"] >= 0.45
    assert share["en"] >= 0.30
    assert set(share) == {"zh", "en", "fr", "es", "de", "ja", "ko", "ru", "pt", "ar"}


def test_test_sets_are_not_trained_on() -> None:
    trained = {item.messages for item in training_data()}
    assert not trained & {item.messages for item in read_labelled([GOLDEN, GOLDEN_PLANS, HELD_OUT, BOUNDARY, HABITS])}


def test_shipped_quality_is_that_of_the_shipped_weights() -> None:
    items = read_labelled([GOLDEN])
    measured = quality(items, [shared_reader().read(item.messages) for item in items])
    shipped = json.loads(QUALITY.read_text(encoding="utf-8"))
    assert measured["messages"] == shipped["messages"] == len(items)
    assert measured["routed_right"] == pytest.approx(shipped["routed_right"], abs=0.01)
    assert measured["surest_right"] == pytest.approx(shipped["surest_right"], abs=0.01)


def test_training_ids_and_messages_are_unique() -> None:
    items = training_data()
    assert len({item.id for item in items}) == len(items)
    assert len({item.messages for item in items}) == len(items)
    assert {item.task for item in items} == set(TASKS)


def test_calibration_error_is_zero_for_a_router_that_knows_how_sure_it_may_be() -> None:
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0.0)
    assert expected_calibration_error([0.95] * 2, [False, False]) == pytest.approx(0.95)
