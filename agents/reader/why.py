"""The words of a message that decided: those for its first step's task, and those that ask for each step of a plan.

A score is a sum over the pieces of a text, so what each piece adds to it is known and not estimated.
"""

import re
from collections.abc import Sequence
from itertools import combinations, pairwise, permutations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.reader.plans import COLUMNS, COUNT, TASKS
from agents.reader.reader import Reading
from onebox.events import Cue

CUES_SHOWN: Final = 3
CUE_FLOOR: Final = 0.3
# Chinese and Japanese are written without spaces: there each character counts for itself.
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_LETTER: Final = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]")
_LONGEST: Final = 64  # letters of a word that are looked for before the first that was read
_CLAUSE_END: Final = re.compile(r"[,;:.!?，；：。！？、→\n]\s*")
_WORD_END: Final = re.compile(r"\s+")
_NEAR: Final = 6  # characters within which a step's words are made to end where a clause does


def cues(reading: Reading, text: str, task: str) -> tuple[Cue, ...]:
    """The spans of `text` that spoke most for `task` against the other tasks; none for a task of a plugin."""
    if task not in TASKS:
        return ()
    first = reading.evidence[:, COLUMNS[0]]
    own = first[:, TASKS.index(task)]
    contrast = own - (first.sum(1) - own) / (COUNT - 1)
    return _best_spans(text, _by_character(reading.spans, contrast, len(text)))


def step_spans(reading: Reading, plan: Sequence[str]) -> list[tuple[int, int]]:
    """For each step the part of the message that asks for it: neighbours that do not overlap, in any order."""
    segments = reading.instruction.segments
    inside = np.array(
        [any(start >= s.start and end <= s.end and end > start for s in segments) for start, end in reading.spans]
    )
    rows = np.flatnonzero(inside)
    if len(rows) < len(plan):
        return []
    gains = np.zeros((len(rows) + 1, len(plan)))
    for place, task in enumerate(plan):
        answers = reading.evidence[rows][:, COLUMNS[place]]
        own = answers[:, TASKS.index(task)]
        contrast = own - answers.mean(1)
        gains[1:, place] = np.cumsum(contrast / (np.abs(contrast).sum() + 1e-9))
    best = -np.inf
    cut: tuple[int, ...] = (0,)
    order: tuple[int, ...] = tuple(range(len(plan)))
    for found in permutations(range(len(plan))):
        for edges in combinations(range(1, len(rows)), len(plan) - 1):
            bounds = (0, *edges, len(rows))
            gain = sum(gains[bounds[k + 1], step] - gains[bounds[k], step] for k, step in enumerate(found))
            if gain > best:
                best, cut, order = gain, bounds, found
    spans = [(0, 0)] * len(plan)
    for k, step in enumerate(order):
        start, end = reading.spans[rows[cut[k]]][0], reading.spans[rows[cut[k + 1] - 1]][1]
        spans[step] = (int(start), int(end))
    return spans


def snap(spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The spans, each border between two of them moved to the nearest end of a clause, else of a word."""
    ordered = sorted(range(len(spans)), key=lambda index: spans[index])
    snapped = list(spans)
    for before, after in pairwise(ordered):
        border = snapped[after][0]
        place = _border(text, border)
        if snapped[before][0] < place < snapped[after][1]:
            snapped[before] = (snapped[before][0], place if place > border else min(snapped[before][1], place))
            snapped[after] = (place, snapped[after][1])
    return snapped


def _border(text: str, border: int) -> int:
    near = range(max(border - _NEAR, 0), border + _NEAR + 1)
    start, stop = max(border - 4 * _NEAR, 0), border + 4 * _NEAR
    for pattern in (_CLAUSE_END, _WORD_END):
        if places := [match.end() for match in pattern.finditer(text, start, stop) if match.end() in near]:
            return min(places, key=lambda at: abs(at - border))
    return border


def _by_character(spans: NDArray[np.int64], weights: NDArray[np.float32], size: int) -> NDArray[np.float64]:
    scores = np.zeros(size)
    for (start, end), weight in zip(spans.tolist(), weights.tolist(), strict=True):
        if 0 <= start < end:
            scores[start:end] += weight / (end - start)
    return scores


def _best_spans(text: str, scores: NDArray[np.float64]) -> tuple[Cue, ...]:
    pieces = [(float(scores[start:end].sum()), start, end) for start, end in _words_with(scores, text)]
    best = max((weight for weight, _, _ in pieces), default=0.0)
    if best <= 0:
        return ()
    spans: list[tuple[float, int, int]] = []
    for weight, start, end in pieces:
        if weight < best * CUE_FLOOR:
            continue
        if spans and text[spans[-1][2] : start] in {"", " "}:
            spans[-1] = (spans[-1][0] + weight, spans[-1][1], end)
        else:
            spans.append((weight, start, end))
    spans.sort(key=lambda span: -span[0])
    return tuple(Cue(text[start:end], start, end, round(weight, 3)) for weight, start, end in spans[:CUES_SHOWN])


def _words_with(scores: NDArray[np.float64], text: str) -> list[tuple[int, int]]:
    """Start and end of each word of `text` that has a score: of a long text only a few words have been read."""
    found: list[tuple[int, int]] = []
    done = 0
    for place in np.flatnonzero(scores).tolist():
        if place < done:
            continue
        start = place
        while start > max(done, place - _LONGEST) and _LETTER.match(text, start) and _LETTER.match(text, start - 1):
            start -= 1
        if (match := _WORD.match(text, start)) is not None:
            found.append(match.span())
            done = match.end()
    return found
