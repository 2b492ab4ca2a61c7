"""Batches keep every token at its position, and every row once per epoch."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.tasks.data.collate import IGNORED, batches, collate, schedule
from softprompt.tasks.data.examples import Example

EXAMPLES = st.lists(
    st.builds(
        Example,
        st.lists(st.integers(1, 99), min_size=1, max_size=9).map(tuple),
        st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple),
        st.none() | st.integers(0, 3),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=6,
)


@given(examples=EXAMPLES, side=st.sampled_from(["left", "right"]), with_answers=st.booleans())
def test_collate_keeps_every_token_at_its_position(examples: list[Example], side: str, with_answers: bool) -> None:
    batch = collate(examples, 0, side, with_answers)  # type: ignore[arg-type]
    for row, example in enumerate(examples):
        ids = list(example.input_ids + (example.answer_ids if with_answers else ()))
        pads = batch.input_ids.shape[1] - len(ids)
        before, behind = ([0] * pads, []) if side == "left" else ([], [0] * pads)
        assert batch.input_ids[row].tolist() == [*before, *ids, *behind]
        assert batch.attention_mask[row].tolist() == [*before, *[1] * len(ids), *behind]
        ignored = [IGNORED] * len(example.input_ids) + (list(example.answer_ids) if with_answers else [])
        assert batch.labels[row].tolist() == [*[IGNORED] * len(before), *ignored, *[IGNORED] * len(behind)]
    assert batch.classes.tolist() == [-1 if example.label is None else example.label for example in examples]
    assert batch.rows.tolist() == [example.row for example in examples]


def test_collate_refuses_invalid_examples() -> None:
    with pytest.raises(ValueError, match="no examples"):
        collate([], 0, "left", False)
    with pytest.raises(ValueError, match="row 8 has no answer"):
        collate([Example((1,), (), None, 7)], 0, "left", True)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
    window=st.integers(1, 6),
)
def test_epoch_has_each_row_once(lengths: list[int], size: int, seed: int, epoch: int, window: int) -> None:
    result = batches(lengths, size, seed, epoch, window)
    assert Counter(itertools.chain.from_iterable(result)) == Counter(range(len(lengths)))
    assert len(result) == -(-len(lengths) // size)
    assert sum(len(batch) < size for batch in result) == (len(lengths) % size > 0)
    assert result == batches(lengths, size, seed, epoch, window)


def test_batches_group_lengths_and_epochs_differ() -> None:
    lengths = [i % 10 for i in range(400)]
    spread = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches(lengths, 4, 0, 0, 100)
    ]
    assert max(spread) == 0
    assert batches(lengths, 4, 0, 0) != batches(lengths, 4, 0, 1)
    assert batches(lengths, 4, 0, 0) != batches(lengths, 4, 1, 0)
    assert batches(lengths, 4, 1, 23) != batches(lengths, 4, 12, 3)


@given(start=st.integers(0, 60))
def test_schedule_resumes_at_any_step(start: int) -> None:
    lengths = [7, 3, 9, 1, 4, 4, 8]
    full = list(itertools.islice(schedule(lengths, 2, seed=5, window=2), 70))
    assert list(itertools.islice(schedule(lengths, 2, seed=5, window=2, start=start), 10)) == full[start : start + 10]
    assert [epoch for epoch, _ in full[:9]] == [0] * 4 + [1] * 4 + [2]


def test_invalid_batch_settings_are_refused() -> None:
    for lengths, size, window in (([], 1, 1), ([1], 0, 1), ([1], 1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            batches(lengths, size, 0, 0, window)
    with pytest.raises(ValueError, match="first step is -1"):
        next(schedule([1], 1, 0, start=-1))
