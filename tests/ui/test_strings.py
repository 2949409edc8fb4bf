from dataclasses import asdict, fields
from string import Formatter

import pytest

from ui.strings import EN, ZH, Strings, pick_language, strings


def _slots(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("name", [field.name for field in fields(Strings)])
def test_every_text_exists_in_both_languages_with_the_same_slots(name: str) -> None:
    english, chinese = asdict(EN)[name], asdict(ZH)[name]
    assert english.strip()
    assert chinese.strip()
    assert _slots(english) == _slots(chinese)


def test_chinese_texts_are_chinese_and_english_ones_are_not() -> None:
    other_way_round = {"lang", "html_lang", "other_language", "variant", "progress"}
    for name, text in asdict(ZH).items():
        if name not in other_way_round:
            assert any("\u4e00" <= character <= "\u9fff" for character in text), name
    for name, text in asdict(EN).items():
        if name not in other_way_round:
            assert not any("\u4e00" <= character <= "\u9fff" for character in text), name


@pytest.mark.parametrize(
    ("saved", "accepted", "language"),
    [
        (None, "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        (None, "en-GB,en;q=0.9,zh;q=0.3", "en"),
        (None, "fr-FR,fr;q=0.9,zh-TW;q=0.5,en;q=0.4", "zh"),
        (None, "de", "en"),
        (None, None, "en"),
        (None, "zh;q=nonsense", "en"),
        ("zh", "en-US", "zh"),
        ("en", "zh-CN", "en"),
        ("xx", "zh-CN", "zh"),
    ],
)
def test_language_is_the_saved_one_else_the_browsers_first_that_is_spoken(
    saved: str | None, accepted: str | None, language: str
) -> None:
    assert pick_language(saved, accepted) == language
    assert strings(language).lang == language
