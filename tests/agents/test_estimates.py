"""Tokens guessed from characters, and what the engine's own counts make of the guess."""

import pytest

from agents.estimates import Estimates
from agents.generation import End
from onebox.messages import user

ENGLISH = "The keeper of the light wrote down what the sea brought in the night. " * 20
CHINESE = "守灯人把大海在夜里带来的东西都记了下来。" * 20


def test_chinese_takes_more_tokens_for_its_characters_than_english() -> None:
    estimates = Estimates()
    english = estimates.call("chat", [user(ENGLISH)], 64)
    chinese = estimates.call("chat", [user(CHINESE)], 64)
    assert not english.wide
    assert chinese.wide
    assert english.prompt / len(ENGLISH) < 0.5 < chinese.prompt / len(CHINESE)


def test_reply_is_taken_to_be_no_longer_than_it_may_be() -> None:
    estimates = Estimates()
    assert estimates.call("chat", [user("Hi")], 16).reply == 16
    assert estimates.call("chat", [user("Hi")], 8192).reply < 1024


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("factor", [0.5, 1.8])
def test_estimate_of_the_prompt_comes_near_to_what_the_engine_counts(text: str, factor: float) -> None:
    estimates = Estimates()
    real = round(estimates.call("chat", [user(text)], 64).prompt * factor)
    for _ in range(60):
        estimates.learn(estimates.call("chat", [user(text)], 64), End("stop", real, 40))
    assert estimates.call("chat", [user(text)], 64).prompt == pytest.approx(real, rel=0.05)


def test_reply_of_a_step_is_expected_as_long_as_its_earlier_ones() -> None:
    estimates = Estimates()
    for _ in range(60):
        estimates.learn(estimates.call("translate", [user("Hi")], 2048), End("stop", 10, 30))
    assert estimates.call("translate", [user("Hi")], 2048).reply == pytest.approx(30, abs=3)
    assert estimates.call("write", [user("Hi")], 2048).reply > 200


def test_one_strange_count_does_not_spoil_the_estimate() -> None:
    estimates = Estimates()
    before = estimates.call("chat", [user(ENGLISH)], 64).prompt
    estimates.learn(estimates.call("chat", [user(ENGLISH)], 64), End("stop", 1_000_000, 40))
    assert estimates.call("chat", [user(ENGLISH)], 64).prompt <= 4 * before + 1
