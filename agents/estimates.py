"""What an engine call will cost in tokens, before the engine has said so: from its characters, and from earlier calls.

Twice the effort of a tokenizer buys nothing here: the estimate orders a queue, and the engine's own count corrects it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from agents.generation import End
from onebox.messages import Message

LATIN_CHARACTERS: Final = 4.0  # of a token
WIDE_CHARACTERS: Final = 1.2  # of a token, in Chinese, Japanese and Korean
MESSAGE_TOKENS: Final = 5  # of the chat template
REPLY_TOKENS: Final = 256
LEARNING: Final = 0.1
FACTOR_RANGE: Final = (0.25, 4.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens of one call. `kind`: calls whose replies are of like length. `wide`: mostly Chinese or the like."""

    kind: str
    wide: bool
    prompt: int
    reply: int

    @property
    def cost(self) -> int:
        """Prompt and reply."""
        return self.prompt + self.reply


class Estimates:
    """Estimates that follow what the engine reports."""

    def __init__(self) -> None:
        self._factors = {False: 1.0, True: 1.0}
        self._replies: dict[str, float] = {}

    def call(self, kind: str, messages: Sequence[Message], max_tokens: int) -> Estimate:
        """The tokens of a call that is about to be made."""
        characters = wide = 0
        for message in messages:
            text = message.text
            characters += len(text)
            if not text.isascii():
                # UTF-8 has three bytes for each wide character, and one or two for the others.
                wide += min(len(text), (len(text.encode("utf-8", "surrogatepass")) - len(text)) // 2)
        narrow = characters - wide
        mostly_wide = wide > narrow
        tokens = narrow / LATIN_CHARACTERS + wide / WIDE_CHARACTERS + MESSAGE_TOKENS * len(messages)
        reply = min(max_tokens, round(self._replies.get(kind, REPLY_TOKENS)))
        return Estimate(kind, mostly_wide, round(tokens * self._factors[mostly_wide]), max(1, reply))

    def learn(self, estimate: Estimate, end: End) -> None:
        """Take in what a whole call really cost."""
        lowest, highest = FACTOR_RANGE
        known = self._factors[estimate.wide]
        right = known * end.prompt_tokens / max(1, estimate.prompt)
        self._factors[estimate.wide] = min(highest, max(lowest, known + LEARNING * (right - known)))
        reply = self._replies.get(estimate.kind, float(REPLY_TOKENS))
        self._replies[estimate.kind] = reply + LEARNING * (end.completion_tokens - reply)
