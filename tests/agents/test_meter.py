"""What a stopped run says it cost."""

import pytest

from agents.llm import Meter


@pytest.mark.parametrize(("meanwhile", "told"), [(0, 14), (0, 11), (0, None), (2, 11), (2, 14), (2, None)])
def test_receipt_counts_each_token_once(meanwhile: int, told: int | None) -> None:
    meter = Meter()
    meter.begin("a", 100)
    meter.draw("a", 5)
    meter.close("a")
    meter.begin("b", 500)
    meter.draw("b", 11)
    standing = meter.standing()
    meter.draw("b", meanwhile)  # comes while the abort is under way
    drawn = max(11 + meanwhile, told or 0)
    assert standing.ended(told, meter.completion_tokens) == (5 + drawn, 500 - drawn)
