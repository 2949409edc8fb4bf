"""What this gateway can do now, put together from its plugins, its settings, its engines and its latest replies.

What the values mean is `onebox.capabilities`. The router's quality is what `agents.train_router` measured on messages
that it does not learn from.
"""

import json
import statistics
import time
from collections import deque
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from agents.engines import Engines
from agents.reader.reader import QUALITY
from agents.steps import STEPS_MAX
from onebox.capabilities import Capabilities, LanguageAbility, Limits, Quality, Speed, TaskAbility
from onebox.errors import OneboxError
from onebox.plugin import Example, Lang, Plugin
from onebox.settings import Settings

EXAMPLES: Final = 3
LATEST: Final = 32
LATEST_S: Final = 600.0
ENGINE_TIMEOUT_S: Final = 1.0
CANNOT: Final[Mapping[Lang, tuple[str, ...]]] = {
    "en": (
        "Look things up: no internet, no weather, prices, news or scores of today. Paste them and ask about them.",
        "Act: no alarms, calls, mails, orders, bookings or payments. It can write the words for them.",
        "See, hear or draw: text in, text out. It can describe a picture that you want to make in words.",
        "Know that it is right: it predicts words, and fluent ones can be wrong. Check what matters.",
    ),
    "zh": (
        "查实时信息：不能上网，不知道今天的天气、价格、新闻和比分。把内容贴过来就可以问。",
        "动手办事：不能定闹钟、打电话、发邮件、下单、预订或付款。可以代拟要用的文字。",
        "看图、听音、画画：只读写文字。可以用文字描述你想要的画面。",
        "保证正确：它只是预测文字，通顺的话也可能是错的。重要的内容请核对。",
    ),
}


class Pace:
    """How fast the latest replies of this worker were."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float, float]] = deque(maxlen=LATEST)

    def note(self, first_text_s: float, tokens: int, seconds: float) -> None:
        """A reply ended after `seconds`, with so many tokens."""
        drawing_s = seconds - first_text_s
        if tokens > 1 and drawing_s > 0:
            self._latest.append((time.monotonic(), first_text_s, (tokens - 1) / drawing_s))

    def speed(self) -> Speed:
        """The medians of those of the last ten minutes."""
        since = time.monotonic() - LATEST_S
        recent = [one for one in self._latest if one[0] >= since]
        if not recent:
            return Speed()
        first, pace = statistics.median(one[1] for one in recent), statistics.median(one[2] for one in recent)
        return Speed(len(recent), round(first, 3), round(pace, 1))


async def capabilities(
    settings: Settings, plugins: Mapping[str, Plugin], engines: Engines, pace: Pace, refused: Mapping[str, str]
) -> Capabilities:
    """What this gateway can do now; `refused` are the plugins that the router never picks, and why.

    An engine that does not answer within a second counts as down.
    """
    readiness = await engines.readiness(ENGINE_TIMEOUT_S)
    measured = _measured()
    limits = Limits(
        await _context(engines, readiness.model),
        settings.max_tokens_cap,
        settings.body_max_bytes,
        settings.messages_max,
        STEPS_MAX,
        settings.run_timeout_s,
    )
    several = engines.spec.several
    tasks = tuple(
        TaskAbility(
            name,
            dict(plugin.title),
            dict(plugin.summary),
            _examples(plugin),
            tuple(engines.spec.order(name)) if several else (),
            measured["tasks"].get(name),
            refused.get(name),
        )
        for name, plugin in plugins.items()
    )
    models = tuple(readiness.models) if readiness.models else (readiness.model,) if readiness.model else ()
    languages = tuple(LanguageAbility(code, share) for code, share in measured["languages"].items())
    quality = Quality(measured["messages"], measured["routed_right"], measured["surest_right"])
    return Capabilities(readiness.state, models, tasks, languages, limits, pace.speed(), CANNOT, quality)


def _examples(plugin: Plugin) -> tuple[Example, ...]:
    chosen: list[Example] = []
    for lang in ("en", "zh"):
        chosen += [example for example in plugin.examples if example.lang == lang][:EXAMPLES]
    return tuple(chosen)


async def _context(engines: Engines, model: str | None) -> int | None:
    if model is None:
        return None
    try:
        return (await engines.card(model)).context_length
    except OneboxError:
        return None


@cache
def _measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(QUALITY.read_text(encoding="utf-8"))
    return found
