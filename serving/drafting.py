"""Drafts from a reply's own text: what once followed its last words is proposed to follow them again.

vLLM checks the drafts in the step that draws the next token, so they change the speed, never the text. This is the
policy: which requests get drafts and how long, so that the extra tokens of a step pay for themselves. vLLM's engine
core asks it after each step, through `serving.vllm_core`. vLLM's own twin, `vllm.v1.spec_decode.ngram_proposer`,
drafts the same length for every request, whatever became of the drafts before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Ids = NDArray[np.int32]

# How often the first token of a draft was right, by the length of the match it follows, and how often each further one
# was when those before it were; see docs/decoding.md. What is beyond a table is as its end.
STARTS: Final = (0.25, 0.50, 0.60, 0.60, 0.60, 0.65, 0.75, 0.90)
RUNS: Final = (0.68, 0.76, 0.80, 0.85, 0.90, 0.94, 0.96)
CHANCE_MAX: Final = 0.98
MATCH_MAX: Final = len(STARTS)
# A request's own record counts as much as the tables after so many expected hits, and fades with each of its tokens.
START_WEIGHT: Final = 6.0
RUN_WEIGHT: Final = 3.0
FADE: Final = 0.95
# A token is drafted where it promises this much more than it costs: chances are guesses, and the best-looking are
# the ones guessed too high.
PROFIT: Final = 1.2
# A step of N tokens takes as long as FREE_TOKENS + N units before it is measured on this machine.
FREE_TOKENS: Final = 24.0
FREE_TOKENS_LEAST: Final = 3.0
FREE_TOKENS_MOST: Final = 192.0
# The price in use doubles or halves once the measured one is off by this. It must not wobble: drafts of other lengths
# sum in another order, and a greedy text could fall another way where two tokens tie.
SLACK: Final = 1.7
COST_FADE: Final = 0.995
COST_STIFFNESS: Final = 8.0
OUTLIER: Final = 3.0

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tally:
    """Hits beside the hits that a table expected, both fading."""

    hits: float = 0.0
    expected: float = 0.0

    def counted(self, hit: bool, chance: float) -> "Tally":
        """The tally after one more token."""
        return Tally(self.hits * FADE + hit, self.expected * FADE + chance)

    def factor(self, weight: float) -> float:
        """By how much the hits exceed or miss the table."""
        return (self.hits + weight) / (self.expected + weight)


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request's drafts, and the draft that is out with the tables' chances for its tokens.

    `draft` is what the text suggests; `sent` is how many of its tokens vLLM was given, perhaps none. All of it is
    compared with what is drawn, so that a request whose drafts stopped paying is heard again.
    """

    starts: Tally = Tally()
    runs: Tally = Tally()
    draft: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    sent: int = 0

    def learned(self, drawn: Sequence[int]) -> "Record":
        """The record once the draft is compared with what was drawn, up to its first miss."""
        starts, runs = self.starts, self.runs
        for place, (token, drafted, chance) in enumerate(zip(drawn, self.draft, self.chances, strict=False)):
            hit = token == drafted
            if place == 0:
                starts = starts.counted(hit, chance)
            else:
                runs = runs.counted(hit, chance)
            if not hit:
                break
        return Record(starts, runs)

    def survival(self) -> list[float]:
        """For each drafted token, the chance that it and all before it are right."""
        start, run, chance = self.starts.factor(START_WEIGHT), self.runs.factor(RUN_WEIGHT), 1.0
        survival: list[float] = []
        for place, own in enumerate(self.chances):
            chance *= min(CHANCE_MAX, own * (run if place else start))
            survival.append(chance)
        return survival


class StepCost:
    """What a step costs by its number of tokens: a line through the steps seen, in coarse steps of its slope."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0
        self._free_tokens = FREE_TOKENS

    @property
    def free_tokens(self) -> float:
        """How many tokens cost as much as a step costs before its first."""
        return self._free_tokens

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if self._weight and self._expected(tokens) * OUTLIER < seconds:
            return
        self._weight = self._weight * COST_FADE + 1
        self._tokens = self._tokens * COST_FADE + tokens
        self._seconds = self._seconds * COST_FADE + seconds
        self._squares = self._squares * COST_FADE + tokens * tokens
        self._products = self._products * COST_FADE + tokens * seconds
        measured = self._measured()
        if measured > self._free_tokens * SLACK:
            self._free_tokens = min(FREE_TOKENS_MOST, self._free_tokens * 2)
        elif measured * SLACK < self._free_tokens:
            self._free_tokens = max(FREE_TOKENS_LEAST, self._free_tokens / 2)

    def _measured(self) -> float:
        slope, tokens, seconds = self._line()
        return seconds / slope - tokens if slope > 0 else math.inf

    def _line(self) -> tuple[float, float, float]:
        """The slope, and the point it goes through; ridge regression towards the slope that is assumed at first."""
        tokens, seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - tokens * tokens
        covariance = self._products / self._weight - tokens * seconds
        assumed = seconds / (FREE_TOKENS + tokens)
        stiffness = COST_STIFFNESS / self._weight
        return (covariance + stiffness * assumed) / (variance + stiffness), tokens, seconds

    def _expected(self, tokens: int) -> float:
        slope, at, seconds = self._line()
        return max(seconds / 2, seconds + slope * (tokens - at))


class Drafter:
    """Proposes drafts for each row of vLLM's batch."""

    def __init__(self, vllm_config: "VllmConfig", clock: Callable[[], float] = time.perf_counter) -> None:
        assert vllm_config.speculative_config is not None
        self._most = int(vllm_config.speculative_config.num_speculative_tokens)
        self._context_length = int(vllm_config.model_config.max_model_len)
        self._records: dict[Key, Record] = {}
        self._cost = StepCost()
        self._clock = clock
        self._asked_at = -math.inf

    def load_model(self, model: object) -> None:
        """Part of vLLM's interface; there is no model."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Ids,
        token_ids_cpu: Ids,
        slot_mappings: Any = None,  # vLLM's type differs by its runner; not used
    ) -> list[list[int]]:
        """A draft for each row of the batch, perhaps empty, given the tokens just drawn and all tokens so far."""
        del slot_mappings
        before, asked_at, now = self._records, self._asked_at, self._clock()
        self._records, self._asked_at = {}, now
        keys: list[Key | None] = []
        records: list[Record] = []
        known = 0
        for row, drawn in enumerate(sampled_token_ids):
            length = int(num_tokens_no_spec[row])
            if not drawn or length >= self._context_length:
                keys.append(None)
                records.append(Record())
                continue
            tokens = token_ids_cpu[row, :length]
            # vLLM names no request here and moves its rows about: one is known again by its length and its tokens' sum.
            total = int(tokens.sum(dtype=np.int64))
            found = before.get((length - len(drawn), total - sum(drawn)))
            known += found is not None
            draft, chances = find_draft(tokens, min(self._most, self._context_length - length - 1))
            keys.append((length, total))
            records.append(replace((found or Record()).learned(drawn), draft=draft, chances=chances))
        if known == len(records) == len(before):
            self._cost.observe(known + sum(record.sent for record in before.values()), now - asked_at)
        lengths = share_out([record.survival() for record in records], self._cost.free_tokens)
        for key, record, sent in zip(keys, records, lengths, strict=True):
            if key is not None:
                self._records[key] = replace(record, sent=sent)
        return [list(record.draft[:sent]) for record, sent in zip(records, lengths, strict=True)]


def find_draft(tokens: Ids, most: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What followed the longest earlier match of the last tokens, and the table's chance for each of its tokens."""
    last = len(tokens) - 1
    if most < 1 or last < 1:
        return (), ()
    ends = np.flatnonzero(tokens[:last] == tokens[last])
    if not ends.size:
        return (), ()
    matched = 1
    while matched < MATCH_MAX:
        longer = ends[ends >= matched]
        longer = longer[tokens[longer - matched] == tokens[last - matched]]
        if not longer.size:
            break
        ends, matched = longer, matched + 1
    start = int(ends[-1]) + 1
    # A match that overlaps its own continuation is a text that goes round: the draft goes round with it.
    draft = tuple(np.resize(tokens[start : start + most], most).tolist())
    runs = (RUNS[min(place + matched // 2, len(RUNS) - 1)] for place in range(len(draft) - 1))
    return draft, (STARTS[matched - 1], *runs)


def share_out(survival: Sequence[Sequence[float]], free_tokens: float) -> list[int]:
    """How long each row's draft is, for the most tokens a second.

    A step that yields `n` tokens for `free_tokens + t` units is bettered by one more token exactly when that token's
    chance exceeds `n / (free_tokens + t)`; so the likeliest go first, until one does not pay with `PROFIT`.
    """
    lengths = [0] * len(survival)
    cost = free_tokens + len(survival)
    gained = float(len(survival))
    for chance, row in sorted(((chance, row) for row, own in enumerate(survival) for chance in own), reverse=True):
        if chance * cost <= gained * PROFIT:
            break
        gained += chance
        cost += 1
        lengths[row] += 1
    return lengths
