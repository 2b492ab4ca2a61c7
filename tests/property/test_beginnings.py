"""Every text is read once, behind what it begins with, and nothing is read apart that does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from softprompt.beginnings import MOST, WORTH, common, readings

SHARED = st.lists(st.integers(0, 2), max_size=400)
"""Of few different tokens, so that texts drawn apart begin alike too."""


@st.composite
def texts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    passages = draw(st.lists(SHARED, min_size=1, max_size=5))
    rest = st.tuples(st.integers(0, 4), st.lists(st.integers(0, 9), min_size=1, max_size=5))
    rests = draw(st.lists(rest, max_size=60))
    return [(*passages[which % len(passages)], *rest) for which, rest in rests]


@given(given=texts(), batch=st.integers(1, 40), apart=st.booleans())
def test_readings(given: list[tuple[int, ...]], batch: int, apart: bool) -> None:
    found = readings(given, batch, apart=apart)
    assert sorted(text for reading in found for text, _ in reading.texts) == list(range(len(given)))
    for reading in found:
        for text, which in reading.texts:
            beginning = reading.beginnings[which]
            assert given[text][: len(beginning)] == beginning
            assert len(given[text]) > len(beginning)
        if not any(reading.beginnings):
            assert len(reading.texts) <= batch
            continue
        assert not apart
        assert all(reading.beginnings)
        whole = sum(len(given[text]) for text, _ in reading.texts)
        rests = sum(len(given[text]) - len(reading.beginnings[which]) for text, which in reading.texts)
        assert whole - rests - sum(map(len, reading.beginnings)) >= WORTH
        assert len(reading.beginnings) == 1 or sum(map(len, reading.beginnings)) <= MOST
        last = max(which for _, which in reading.texts)
        assert sum(which != last for _, which in reading.texts) < batch, "no more beginnings than fill a batch"


@given(given=texts())
def test_what_all_begin_with(given: list[tuple[int, ...]]) -> None:
    found = common(given)
    assert all(text[: len(found)] == found and len(text) > len(found) for text in given)
    assert not found or len(found) * (len(given) - 1) >= WORTH


def test_questions_about_passages() -> None:
    """Each passage is read once, also where its questions are more than a batch, and next to one that has one alone."""
    passages = [(place,) * 300 for place in range(4)]
    asked = [0] * 50 + [1] * 3 + [2] * 4 + [3]
    given = [(*passages[which], place) for place, which in enumerate(asked)]
    found = readings(given, 32)
    assert sum(len(beginning) for reading in found for beginning in reading.beginnings) == 900
    assert len(found[-1].texts) == 1


def test_an_instruction_for_all() -> None:
    instruction = tuple(range(20))
    assert common([(*instruction, place) for place in range(11)]) == instruction
    assert common([(*instruction, place) for place in range(10)]) == (), "180 tokens saved do not pay"
    assert common([]) == ()
