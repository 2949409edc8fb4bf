"""A reply that goes in circles, and those that only look like it."""

import pytest

from plugins.repetition import goes_in_circles

LONG = "The river runs to the sea, and the sea gives back the rain. "


@pytest.mark.parametrize(
    "text",
    [
        LONG * 5,
        "Once upon a time. " + LONG * 6,
        "是的,我知道了。" * 20,
        "ha" * 80,
        "a" * 120,
        "so it goes and " * 9 + "so it",
    ],
)
def test_circle_is_noticed(text: str) -> None:
    assert goes_in_circles(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        LONG,
        LONG * 4,
        "ha" * 59,
        " " * 200 + "end",
        LONG * 5 + "And then it stopped.",
        "x".join(map(str, range(99))),
    ],
)
def test_reply_that_goes_on_is_not(text: str) -> None:
    assert not goes_in_circles(text)


def test_blank_lines_alone_are_a_circle_only_in_a_row() -> None:
    assert goes_in_circles("\n" * 120)
    assert not goes_in_circles("\n".join(f"Line {number} of the table" for number in range(40)))
