"""The drafts' policy, without vLLM: what is drafted, for whom, how long, and that a row is known again."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from serving.drafting import FREE_TOKENS, SLACK, Drafter, StepCost, find_draft, share_out

MOST, CONTEXT = 16, 128
TEXT = list(range(100, 140))


@dataclass
class Batch:
    """A stand-in for vLLM's input batch: rows of tokens, the drafter that is asked, and steps that take their time."""

    rows: list[list[int]]
    now_s: float = 0.0
    sent: int = 0

    def __post_init__(self) -> None:
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=MOST),
            model_config=SimpleNamespace(max_model_len=CONTEXT),
        )
        self.drafter = Drafter(config, clock=lambda: self.now_s)  # type: ignore[arg-type]  # what it reads of it

    def step(self, *drawn: list[int]) -> list[list[int]]:
        """Draw these tokens in each row and ask for drafts."""
        self.now_s += FREE_TOKENS + len(self.rows) + self.sent
        ids = np.zeros((len(self.rows), CONTEXT), dtype=np.int32)
        for row, (tokens, new) in enumerate(zip(self.rows, drawn, strict=True)):
            tokens += new
            ids[row, : len(tokens)] = tokens
        lengths = np.array([len(tokens) for tokens in self.rows], dtype=np.int32)
        drafts = self.drafter.propose(list(drawn), lengths, ids)
        self.sent = sum(map(len, drafts))
        return drafts


def test_what_followed_the_longest_match_is_drafted() -> None:
    tokens = np.array([1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3], dtype=np.int32)
    draft, chances = find_draft(tokens, 3)
    assert draft == (70, 9, 2)
    assert list(chances) == sorted(chances)


def test_text_that_goes_round_is_drafted_round_and_round() -> None:
    assert find_draft(np.array([9, 5, 6, 7, 5, 6, 7, 5], dtype=np.int32), 5)[0] == (6, 7, 5, 6, 7)


def test_latest_of_equally_long_matches_is_drafted() -> None:
    tokens = np.array([2, 3, 70, 9, 2, 3, 80, 1, 2, 3], dtype=np.int32)
    assert find_draft(tokens, 2)[0] == (80, 1)


@pytest.mark.parametrize("tokens", [[], [5], [1, 2, 3, 4]])
def test_text_without_a_repetition_has_no_draft(tokens: list[int]) -> None:
    assert find_draft(np.array(tokens, dtype=np.int32), MOST) == ((), ())


def test_copied_text_is_drafted_longer_the_better_the_drafts_do() -> None:
    batch = Batch([[*TEXT, 1, 2]])
    (first,) = batch.step([TEXT[0]])
    assert first == TEXT[1 : 1 + len(first)] != []
    (second,) = batch.step(TEXT[1:4])
    assert second == TEXT[4 : 4 + len(second)]
    assert len(second) > len(first)


@pytest.mark.parametrize(("rows", "most"), [(1, 6), (24, 0)])
def test_request_whose_drafts_are_wrong_gets_short_ones_and_none_beside_many_others(rows: int, most: int) -> None:
    batch = Batch([[*TEXT, 1] for _ in range(rows)])
    drafts = batch.step(*(TEXT[:8] for _ in batch.rows))
    assert all(len(draft) > most for draft in drafts)
    for turn in range(9, 39, 2):
        drafts = batch.step(*([TEXT[turn]] for _ in batch.rows))
    assert all(len(draft) <= most for draft in drafts)


def test_record_follows_its_request_to_another_row() -> None:
    good, bad = [*TEXT, 1], [*TEXT, 2]
    batch = Batch([good, bad])
    for turn in range(15):
        before = batch.step([TEXT[turn]], [TEXT[2 * turn]])
    assert len(before[0]) > len(before[1])
    twin = Batch([bad, good])
    twin.drafter = batch.drafter
    after = twin.step([TEXT[30]], [TEXT[15]])
    assert len(after[1]) >= len(before[0]) > len(after[0])


def test_rows_that_draw_nothing_have_no_draft() -> None:
    batch = Batch([[*TEXT, TEXT[0]], [*TEXT, 1]])
    assert batch.step([], [TEXT[0]])[0] == []


def test_draft_never_reaches_beyond_the_context() -> None:
    batch = Batch([[7] * (CONTEXT - 4)])
    for _ in range(3):
        (draft,) = batch.step([7])
        assert len(batch.rows[0]) + len(draft) < CONTEXT
    assert batch.step([7]) == [[]]


def test_likelier_tokens_go_first_and_tokens_that_do_not_pay_do_not_go() -> None:
    assert share_out([[0.9, 0.8], [0.3]], free_tokens=3.0) == [2, 0]
    assert share_out([[0.9, 0.8], [0.3]], free_tokens=100.0) == [2, 1]
    assert share_out([[], []], free_tokens=2.0) == [0, 0]


@pytest.mark.parametrize(("fixed_s", "token_s"), [(0.040, 0.010), (0.020, 0.001), (0.200, 0.001)])
def test_price_of_a_token_is_learned_from_the_steps(fixed_s: float, token_s: float) -> None:
    cost = StepCost()
    assert cost.free_tokens == FREE_TOKENS
    for turn in range(200):
        tokens = 1 + turn % 9
        cost.observe(tokens, fixed_s + token_s * tokens)
        if turn % 50 == 49:
            cost.observe(tokens, 5.0)  # the machine was busy with something else
    assert 1 / SLACK < cost.free_tokens / (fixed_s / token_s) < SLACK


def test_price_stays_as_assumed_where_all_steps_are_alike() -> None:
    cost = StepCost()
    for turn in range(200):
        cost.observe(1, 0.030 + 0.001 * (turn % 3))
    assert cost.free_tokens == FREE_TOKENS
