"""Which language a text is in, and which one a request names."""

import pytest

from plugins.language import LanguageDetector, language_named, reply_lang, target_language


@pytest.fixture(scope="module")
def detector() -> LanguageDetector:
    return LanguageDetector()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Hello world", "en"),
        ("ok", "en"),
        ("你好，世界", "zh"),
        ("Le chat est sur la table.", "fr"),
        ("Guten Morgen, wie geht es dir?", "de"),
        ("今日はいい天気ですね", "ja"),
        ("안녕하세요", "ko"),
        ("Привет, как дела сегодня?", "ru"),
        ("¿Dónde está la biblioteca?", "es"),
        ("我用 Python 写代码", "zh"),
    ],
)
def test_language_of_a_text_is_detected(detector: LanguageDetector, text: str, code: str) -> None:
    found = detector.detect(text)
    assert found is not None
    assert found.code == code


@pytest.mark.parametrize("text", ["", "12:30", "... !!!"])
def test_text_without_letters_has_no_language(detector: LanguageDetector, text: str) -> None:
    assert detector.detect(text) is None


@pytest.mark.parametrize(
    ("instruction", "code"),
    [
        ("翻译成法语", "fr"),
        ("请把下面的话翻译为英文：", "en"),
        ("译成日文", "ja"),
        ("中译英", "en"),
        ("英译中：", "zh"),
        ("用西班牙语怎么说", "es"),
        ("translate into French", "fr"),
        ("Translate this from English to Chinese, please", "zh"),
        ("translate from french into german", "de"),
        ("auf Deutsch", "de"),
        ("traduis en anglais", "en"),
        ("traduce al texto en español", "es"),
        ("翻译成繁体中文", "zh-Hant"),
        ("把这段英文翻译成韩语", "ko"),
        ("French:", "fr"),
        ("日本語に翻訳して", "ja"),
        ("переведи на русский", "ru"),
        ("en -> de", None),
        ("English -> German", "de"),
    ],
)
def test_target_is_read_from_the_request(instruction: str, code: str | None) -> None:
    found = target_language(instruction)
    assert (found.code if found else None) == code


@pytest.mark.parametrize(
    "instruction", ["translate this", "翻译一下", "translate the French text", "翻译这段英文的文章"]
)
def test_request_that_names_no_target_has_none(instruction: str) -> None:
    assert target_language(instruction) is None


@pytest.mark.parametrize("name", ["fr", "French", "法语", "法文", "français", " FRANÇAIS "])
def test_language_is_known_by_code_and_by_any_name(name: str) -> None:
    found = language_named(name)
    assert found is not None
    assert found.code == "fr"


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("你好", "zh"),
        ("Hello", "en"),
        ("Translate 你好 into English", "en"),
        ("用 Python 写一个排序", "zh"),
        ("こんにちは、漢字", "en"),
        ("", "en"),
    ],
)
def test_reply_is_chinese_for_mostly_chinese_requests(text: str, lang: str) -> None:
    assert reply_lang(text) == lang
