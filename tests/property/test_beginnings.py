"""Every text is read once, behind what it begins with, and nothing is read apart that does not pay."""

from hypothesis import given
from hypothesis import strategies as st

from softprompt.evaluation.prefix_sharing import MIN_SAVING, MOST, _groups, common, plan_prefix_groups

SHARED = st.lists(st.integers(0, 2), max_size=400)
"""Of few different tokens, so that texts drawn apart begin alike too."""


@st.composite
def texts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    passages = draw(st.lists(SHARED, min_size=1, max_size=5))
    rest = st.tuples(st.integers(0, 4), st.lists(st.integers(0, 9), min_size=1, max_size=5))
    rests = draw(st.lists(rest, max_size=60))
    return [(*passages[which % len(passages)], *rest) for which, rest in rests]


@given(given=texts(), batch=st.integers(1, 40), share=st.booleans())
def test_readings(given: list[tuple[int, ...]], batch: int, share: bool) -> None:
    found = plan_prefix_groups(given, batch, share=share)
    assert sorted(text for reading in found for text, _ in reading.texts) == list(range(len(given)))
    for reading in found:
        for text, which in reading.texts:
            beginning = reading.beginnings[which]
            assert given[text][: len(beginning)] == beginning
            assert len(given[text]) > len(beginning)
        if not any(reading.beginnings):
            assert len(reading.texts) <= batch
            continue
        assert share
        assert all(reading.beginnings)
        whole = sum(len(given[text]) for text, _ in reading.texts)
        rests = sum(len(given[text]) - len(reading.beginnings[which]) for text, which in reading.texts)
        assert whole - rests - sum(map(len, reading.beginnings)) >= MIN_SAVING
        if len(reading.beginnings) > 1:
            longest = max(map(len, reading.beginnings))
            assert len(reading.beginnings) * longest <= MOST
            assert 2 * min(map(len, reading.beginnings)) >= longest
            assert len(reading.texts) <= batch


@given(given=texts())
def test_what_all_begin_with(given: list[tuple[int, ...]]) -> None:
    found = common(given)
    assert all(text[: len(found)] == found and len(text) > len(found) for text in given)
    assert not found or len(found) * (len(given) - 1) >= MIN_SAVING


def best(texts: list[tuple[int, ...]], depth: int = 0) -> int:
    """Most tokens that groups of these texts, which share `depth` tokens, can save; each is left one token."""
    parts: dict[int, list[tuple[int, ...]]] = {}
    for text in texts:
        if len(text) > depth + 1:
            parts.setdefault(text[depth], []).append(text)
    within = sum(best(part, depth + 1) for part in parts.values() if len(part) > 1)
    return max(depth * (len(texts) - 1), within)


@given(given=texts())
def test_groups_save_the_most_tokens(given: list[tuple[int, ...]]) -> None:
    found = _groups(given)
    members = [text for _, group in found for text in group]
    assert len(members) == len(set(members))
    for length, group in found:
        assert len(group) > 1
        assert len({given[text][:length] for text in group}) == 1
        assert min(len(given[text]) for text in group) > length
    assert sum(length * (len(group) - 1) for length, group in found) == best(given)


def test_questions_about_passages() -> None:
    """Each is read once, though all begin with one token, one has a single question and one more than a batch."""
    passages = [(1, *(2 + place,) * 300) for place in range(4)]
    asked = [0, *[1] * 50, *[2] * 3, *[3] * 4]
    given = [(*passages[which], place) for place, which in enumerate(asked)]
    found = plan_prefix_groups(given, 32)
    assert sum(len(beginning) for reading in found for beginning in reading.beginnings) == 903
    assert [len(reading.texts) for reading in found] in ([50, 7, 1], [7, 50, 1])


def test_readings_fill_batches() -> None:
    """Seven passages with five questions each are 30 and 5 rows, and not 32 and 3; one much longer runs apart."""
    given = [(place,) * 100 + (other,) for place in range(7) for other in range(5)]
    assert [len(reading.texts) for reading in plan_prefix_groups(given, 32)] == [30, 5]
    longer = [(9,) * 900 + (other,) for other in range(5)]
    assert [len(reading.texts) for reading in plan_prefix_groups(given + longer, 32)] == [5, 30, 5]


def test_an_instruction_for_all() -> None:
    instruction = tuple(range(20))
    assert common([(*instruction, place) for place in range(11)]) == instruction
    assert common([(*instruction, place) for place in range(10)]) == (), "180 tokens saved do not pay"
    assert common([]) == ()
