"""Third-party plugins in the router: a message belongs to the plugin whose examples it is near.

The head knows nothing about them; their own examples and counter-examples are all there is.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.encoder import Encoder
from agents.instruction import split_instruction
from agents.router_features import embedded_text
from onebox.plugin import Example, Plugin

# Share one half at this similarity; paraphrases of an example score about 0.7, unrelated requests under 0.4.
MIDPOINT: Final = 0.62
STEEPNESS: Final = 18.0
SHARE_MAX: Final = 0.97


class PluginMatch:
    """Plugins by nearest example. Examples are embedded when first needed."""

    def __init__(self, plugins: Sequence[Plugin], encoder: Encoder) -> None:
        self._plugins = tuple(plugins)
        self._encoder = encoder
        self._vectors: list[tuple[NDArray[np.float32], NDArray[np.float32]]] | None = None

    def shares(self, text: str, embedding: NDArray[np.float32]) -> dict[str, float]:
        """A share per plugin; together below 1, the rest is for the head's tasks."""
        if self._vectors is None:
            self._vectors = [(self._embed(p.examples), self._embed(p.counter_examples)) for p in self._plugins]
        found = {}
        for plugin, (near, far) in zip(self._plugins, self._vectors, strict=True):
            likeness = max(
                self._nearest(embedding, near), max((_overlap(text, e.text) for e in plugin.examples), default=0.0)
            )
            against = self._nearest(embedding, far)
            margin = likeness - max(MIDPOINT, against)
            found[plugin.name] = SHARE_MAX / (1.0 + float(np.exp(-STEEPNESS * margin)))
        total = sum(found.values())
        return {name: share * min(1.0, SHARE_MAX / total) for name, share in found.items()} if total else found

    def _embed(self, examples: Sequence[Example]) -> NDArray[np.float32]:
        texts = [embedded_text(split_instruction(example.text)) for example in examples]
        return self._encoder.embed(texts) if texts else np.zeros((0, 512), dtype=np.float32)

    @staticmethod
    def _nearest(embedding: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
        return float((vectors @ embedding).max()) if len(vectors) else 0.0


def _overlap(text: str, example: str) -> float:
    """The Jaccard index of character trigrams."""
    a, b = ({t.lower()[i : i + 3] for i in range(max(len(t) - 2, 1))} for t in (text, example))
    return len(a & b) / len(a | b) if a | b else 0.0
