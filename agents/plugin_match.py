"""Third-party plugins in the router: a message belongs to the plugin whose examples it is near.

The head knows nothing about them; their own examples and counter-examples are all there is. A plugin that would take
more than half a point of the golden messages from the tasks they belong to is never picked by itself.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.encoder import DIMENSIONS, Encoder
from agents.golden import HARM, golden
from agents.instruction import Instruction, split_instruction
from onebox.plugin import Example, Plugin

# Share one half at this similarity; paraphrases of an example score about 0.7, unrelated requests under 0.4.
MIDPOINT: Final = 0.62
STEEPNESS: Final = 18.0
SHARE_MAX: Final = 0.97
EMBEDDED_CHARS: Final = 180

logger = logging.getLogger(__name__)


class PluginMatch:
    """Plugins by nearest example. Examples are embedded, and tried on the golden messages, when first needed."""

    def __init__(self, plugins: Sequence[Plugin], encoder: Encoder) -> None:
        self._plugins = tuple(plugins)
        self._encoder = encoder
        self._known: list[_Known] | None = None
        self.refused: dict[str, str] = {}

    def shares(self, instruction: Instruction) -> dict[str, float]:
        """A share per plugin; together below 1, the rest is for the head's tasks."""
        if self._known is None:
            self._known = self._learn()
        return _shares(self._known, instruction.text, self._encoder.embed([embedded_text(instruction.text)])[0])

    def _learn(self) -> list["_Known"]:
        texts = golden().texts
        vectors = self._encoder.embed([embedded_text(text) for text in texts])
        known = []
        for plugin in self._plugins:
            one = _Known(plugin, self._embed(plugin.examples), self._embed(plugin.counter_examples))
            taken = [_shares([one], text, vector)[plugin.name] for text, vector in zip(texts, vectors, strict=True)]
            cost = golden().cost(np.asarray(taken))
            if cost <= HARM:
                known.append(one)
                continue
            self.refused[plugin.name] = (
                f"Its examples would draw {100 * cost:.1f} % of the test messages of other tasks to it (at most "
                f"{100 * HARM:.1f} %). Make them more particular, or add counter-examples."
            )
            logger.warning("The router never picks plugin %r by itself. %s", plugin.name, self.refused[plugin.name])
        return known

    def _embed(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        texts = [embedded_text(split_instruction(example.text).text) for example in examples]
        return self._encoder.embed(texts) if texts else np.zeros((0, DIMENSIONS), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class _Known:
    """A plugin with the embeddings of its examples and counter-examples."""

    plugin: Plugin
    near: NDArray[np.float32]
    far: NDArray[np.float32]


def embedded_text(instruction: str) -> str:
    """The part of an instruction that is embedded."""
    if len(instruction) <= EMBEDDED_CHARS:
        return instruction or "."
    return instruction[: EMBEDDED_CHARS * 2 // 3] + " " + instruction[-EMBEDDED_CHARS // 3 :]


def _shares(known: Sequence[_Known], text: str, embedding: NDArray[np.float32]) -> dict[str, float]:
    found = {}
    for one in known:
        written = max((_overlap(text, example.text) for example in one.plugin.examples), default=0.0)
        likeness = max(_nearest(embedding, one.near), written)
        margin = likeness - max(MIDPOINT, _nearest(embedding, one.far))
        found[one.plugin.name] = SHARE_MAX / (1.0 + float(np.exp(-STEEPNESS * margin)))
    total = sum(found.values())
    return {name: share * min(1.0, SHARE_MAX / total) for name, share in found.items()} if total else found


def _nearest(embedding: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
    return float((vectors @ embedding).max()) if len(vectors) else 0.0


def _overlap(text: str, example: str) -> float:
    """The Jaccard index of character trigrams."""
    a, b = ({t.lower()[i : i + 3] for i in range(max(len(t) - 2, 1))} for t in (text, example))
    return len(a & b) / len(a | b) if a | b else 0.0
