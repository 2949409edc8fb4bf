"""What `top` computes from two scrapes."""

import pytest

from deploy.scrape import Scrape, Window, parse

BEFORE = """\
# TYPE runs_total counter
runs_total{task="qa"} 10
runs_total{task="chat"} 7
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 5
wait_seconds_bucket{le="0.5"} 5
wait_seconds_bucket{le="+Inf"} 5
wait_seconds_count 5
wait_seconds_sum 0.2
"""
AFTER = """\
# TYPE runs_total counter
runs_total{task="qa"} 14
runs_total{task="chat"} 2
runs_total{task="write"} 1
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 5
wait_seconds_bucket{le="0.5"} 13
wait_seconds_bucket{le="+Inf"} 15
wait_seconds_count 15
wait_seconds_sum 9
"""


@pytest.fixture
def window() -> Window:
    return Window(Scrape(100.0, parse(BEFORE)), Scrape(102.0, parse(AFTER)))


def test_a_counter_that_fell_has_begun_again(window: Window) -> None:
    assert window.gain("runs_total", task="qa") == 4
    assert window.gain("runs_total", task="chat") == 2
    assert window.gain("runs_total") == 7
    assert window.rate("runs_total") == 3.5


def test_quantiles_are_of_the_window_alone_and_lie_within_their_bucket(window: Window) -> None:
    assert window.quantile(0.5, "wait_seconds") == pytest.approx(0.1 + 0.4 * 5 / 8)
    assert window.quantile(0.8, "wait_seconds") == pytest.approx(0.5)
    assert window.quantile(0.99, "wait_seconds") == 0.5  # beyond the last bound nothing is known
    assert window.quantile(0.5, "nothing_seconds") is None
    assert Window(window.after, window.after).quantile(0.5, "wait_seconds") is None
