"""The reader: how text is split, what of it is read, and that what runs is what was trained."""

import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from agents.labelled import GOLDEN, read_labelled
from agents.reader import train
from agents.reader.encoding import END, LENGTH, START, encode
from agents.reader.pieces import LINE_END, Pieces
from agents.reader.plans import STOP, TASKS, numbers
from agents.reader.reader import Reader
from agents.reader.source import Source
from agents.reader.weights import Calibration, Weights, stored
from agents.reader.why import snap
from agents.train_router import LIKE, digest, first_losses
from onebox.messages import assistant, user

LONG = "The ferry stops in November. Repairs to the pier cost more than planned. " * 20


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


@pytest.fixture(scope="module")
def pieces(source: Source) -> Pieces:
    return Pieces(source)


def test_text_is_cut_as_another_implementation_cuts_it(source: Source, pieces: Pieces) -> None:
    letters, bounds, scores = source.vocabulary()
    known = [letters[start:end].decode() for start, end in pairwise(bounds.tolist())]
    other = Tokenizer(models.Unigram(list(zip(known, scores.tolist(), strict=True)), unk_id=3))
    other.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [item.messages[-1].text.replace("\n", " ").strip() for item in read_labelled([GOLDEN])]
    for text in [
        *texts,
        "ｆｕｌｌ　ｗｉｄｔｈ",
        "ﬁn 한국어 ️",
        "🙂 ok",
        unicodedata.normalize("NFD", "한국어 été"),
        "ﾊﾞｽ",
    ]:
        assert [piece.id for piece in pieces.split(text)] == other.encode(text).ids, text


@given(st.text(max_size=60))
def test_pieces_cover_the_text_in_order(pieces: Pieces, text: str) -> None:
    found = pieces.split(text)
    ends = [0, *(piece.end for piece in found)]
    assert all(ends[index] <= piece.start <= piece.end <= len(text) for index, piece in enumerate(found))
    covered = {place for piece in found for place in range(piece.start, piece.end)}
    missing = [char for place, char in enumerate(text) if place not in covered]
    assert all(
        char.isspace() or unicodedata.combining(char) or not unicodedata.normalize("NFKC", char).strip()
        for char in missing
    ), missing


def test_line_end_is_a_piece(pieces: Pieces) -> None:
    assert [piece.id == LINE_END for piece in pieces.split("a\n\nb")] == [False, True, False]


def test_pieces_take_what_is_no_text(pieces: Pieces) -> None:
    assert pieces.split("a \ud83d b")[-1].end == len("a \ud83d b")


def test_short_message_is_read_whole(pieces: Pieces) -> None:
    encoded = encode(pieces, [user("Translate this into French: good night")])
    assert encoded.ids[0] == START
    assert encoded.ids[-1] == END
    assert len(encoded.ids) == len(pieces.split("Translate this into French: good night")) + 2


@pytest.mark.parametrize("text", [f"Sum it up please:\n{LONG}", f"{LONG}\nSum it up please"])
def test_request_around_a_long_text_is_read(pieces: Pieces, text: str) -> None:
    encoded = encode(pieces, [user(text)])
    assert len(encoded.ids) <= LENGTH
    read = "".join(text[start:end] for start, end in encoded.spans.tolist() if start >= 0)
    assert "Sumitupplease" in read.replace(" ", "")


@pytest.mark.parametrize("blank", ["    ", "  ", "\t\t"])
def test_blanks_within_a_text_are_no_gaps(pieces: Pieces, blank: str) -> None:
    code = "\n".join(f"{blank}if ready(part_{number}):{blank}go(part_{number})" for number in range(12))
    text = f"{code}\nwhat does this print on a Monday?"
    encoded = encode(pieces, [user(text)])
    assert len(encoded.ids) <= LENGTH
    read = "".join(text[start:end] for start, end in encoded.spans.tolist() if start >= 0)
    assert read.endswith("whatdoesthisprintonaMonday?") or read.endswith("what does this print on a Monday?")


def test_last_words_of_a_long_earlier_request_are_read(pieces: Pieces) -> None:
    long = encode(pieces, [user(f"{LONG}\nPut this into French"), assistant("Bien."), user("shorter")])
    other = encode(pieces, [user(f"{LONG}\nPut this into Dutch"), assistant("Goed."), user("shorter")])
    assert long.ids.tolist() != other.ids.tolist()


def test_request_in_the_middle_of_a_long_text_is_read(pieces: Pieces) -> None:
    text = f"{LONG}\nplease translate into French\n{LONG}"
    encoded = encode(pieces, [user(text)])
    read = "".join(text[start:end] for start, end in encoded.spans.tolist() if start >= 0)
    assert "translateintoFrench" in read.replace(" ", "")


def test_earlier_request_is_read_too(pieces: Pieces) -> None:
    alone = encode(pieces, [user("shorter")])
    talk = encode(pieces, [user("Write a poem about rain"), assistant("Rain."), user("shorter")])
    assert len(talk.ids) > len(alone.ids)
    assert (talk.spans[len(alone.ids) :] == -1).all()


def test_what_runs_says_what_was_trained(source: Source, pieces: Pieces) -> None:
    net = train.fresh(source).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("layers.") and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        net.weigh.weight.normal_(std=0.1)
        net.middle.normal_(std=0.1)
        net.spread.fill_(0.3)
    kept = stored(net.arrays(), source)
    kept["calibration"] = np.array(Calibration().numbers())
    reading = Reader(Weights(kept), source).read([user("请把这段话翻译成英文：我们明天去北京开会。")])
    (example,) = train.examples(
        pieces, [train.Labelled("a", (user("请把这段话翻译成英文：我们明天去北京开会。"),), ("qa",), "zh")]
    )
    expected = train.scores(net, [example])[0]
    found = reading.evidence.sum(0) + kept["answers.bias"]
    assert np.abs(found - expected).max() < 0.15 * np.abs(expected).max()
    assert reading.probabilities.sum() == pytest.approx(1.0, abs=1e-5)


def test_plan_in_numbers_ends_with_stops() -> None:
    assert numbers(("translate", "qa")) == [TASKS.index("translate"), TASKS.index("qa"), STOP]
    assert numbers(("write",)) == [TASKS.index("write"), STOP, STOP]


def test_words_of_steps_are_neighbours_that_meet_at_the_end_of_a_clause() -> None:
    text = "Summarise the notes, then write a title"
    assert snap([(0, 21), (22, 39)], text) == [(0, 21), (21, 39)]
    assert snap([(20, 39), (0, 18)], text) == [(21, 39), (0, 21)]


def test_shipped_weights_are_what_the_data_gives() -> None:
    """Other messages make other batches, whose losses differ by whole units; another processor differs by a little."""
    stored = Weights.load()
    assert str(stored.arrays["digest"]) == digest()
    assert first_losses() == pytest.approx(stored["losses"].tolist(), rel=LIKE, abs=LIKE)
