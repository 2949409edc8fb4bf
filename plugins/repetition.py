"""Notices a reply that goes round in circles, which small models fall into and do not leave by themselves."""

import re
from typing import Final

TIMES: Final = 5
PERIOD_MIN: Final = 4
PERIOD_MAX: Final = 400
TOTAL_MIN: Final = 120
STEP: Final = 48
_WANTED: Final = re.compile(r"\b(?:repeat\w*|times|again and again)\b|重复|[遍次]", re.IGNORECASE)


def is_wanted(request: str) -> bool:
    """Whether the user asks for repetition."""
    return bool(_WANTED.search(request))


def goes_in_circles(text: str) -> bool:
    """Whether the text ends in one passage five times in a row, 120 characters or more in all."""
    for period in range(PERIOD_MIN, min(PERIOD_MAX, len(text) // TIMES) + 1):
        if text[-period:] == text[-2 * period : -period] and period * TIMES >= TOTAL_MIN:
            block = text[-period:]
            if block.strip() and text.endswith(block * TIMES):
                return True
    short = text[-TOTAL_MIN:]
    return len(short) == TOTAL_MIN and any(
        short == (short[:period] * (TOTAL_MIN // period + 1))[:TOTAL_MIN] for period in range(1, TOTAL_MIN // TIMES)
    )
