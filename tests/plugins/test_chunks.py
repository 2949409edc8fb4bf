"""Long texts are cut where their structure allows and lose nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebox.messages import user
from onebox.testing import ScriptedContext
from plugins.chunks import passages, sentences, split_text, split_to_fit


@given(st.text(alphabet="ab 。.\n天🙂!?", max_size=400), st.integers(8, 60))
def test_chunks_join_to_the_text_and_keep_the_limit(text: str, limit: int) -> None:
    chunks = split_text(text, limit)
    assert "".join(chunks) == text
    assert all(len(chunk.encode()) <= limit for chunk in chunks)


def test_paragraphs_stay_whole_where_they_fit() -> None:
    text = "First paragraph here.\n\nSecond one is here.\n\nThird."
    assert split_text(text, 32) == ["First paragraph here.\n\n", "Second one is here.\n\nThird."]


def test_long_paragraph_is_cut_between_sentences() -> None:
    assert split_text("今天下雨。我在家看书。你呢？", 36) == ["今天下雨。我在家看书。", "你呢？"]


@given(st.text(alphabet="ab 。.\n天", max_size=300))
def test_offsets_point_at_the_pieces(text: str) -> None:
    for span in [*sentences(text), *passages(text, 40)]:
        assert text[span.start : span.end] == span.text


@pytest.mark.parametrize("text", ["word " * 900, "天" * 3000, "plain words first. " * 50 + "天地玄黄" * 400])
async def test_chunks_fit_by_the_engine_s_own_count(text: str) -> None:
    llm = ScriptedContext().llm
    chunks = await split_to_fit(llm, text, 300)
    assert "".join(chunks) == text
    assert [await llm.count_tokens([user(chunk)]) <= 300 for chunk in chunks] == [True] * len(chunks)
