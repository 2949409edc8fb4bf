"""Notices a reply that goes round in circles, which small models fall into and do not leave by themselves."""

import re
from typing import Final

TIMES: Final = 5
PERIOD_MIN: Final = 4
PERIOD_MAX: Final = 400
TOTAL_MIN: Final = 120
STEP: Final = 48
END: Final = 8  # characters that a text that goes in circles has had one passage before its end
_WANTED: Final = re.compile(r"\b(?:repeat\w*|times|again and again)\b|重复|[遍次]", re.IGNORECASE)


def is_wanted(request: str) -> bool:
    """Whether the user asks for repetition."""
    return bool(_WANTED.search(request))


def goes_in_circles(text: str) -> bool:
    """Whether the text ends in one passage five times in a row, 120 characters or more in all.

    A short passage fills these 120, the last time perhaps not whole.
    """
    if len(text) < TOTAL_MIN:
        return False
    end, at = text[-END:], len(text) - END
    while (at := text.rfind(end, max(0, len(text) - END - PERIOD_MAX), at + END - 1)) >= 0:
        period = len(text) - END - at  # the text ended like this so long before
        block = text[-period:]
        if period * TIMES >= TOTAL_MIN:
            if block.strip() and text.endswith(block * TIMES):
                return True
        elif text[-TOTAL_MIN + period :] == text[-TOTAL_MIN:-period]:
            return True
    return False
