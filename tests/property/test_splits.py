"""Splits lose no row and share none, keep groups and classes, and few-shot samples are reproducible."""

import dataclasses
import hashlib
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt import assets
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import read_splits
from softprompt.tasks import READERS, TASKS, Task
from softprompt.tasks.data.splits import Splits, shots, splits

REVIEW = Task(
    name="review",
    template="Review: {text}\nTitle: {title}\nSentiment:",
    label="verdict",
    label_words={"0": "negative", "1": "positive"},
)


def table(n: int, groups: int = 0) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"film number {i}" for i in range(n)],
            "title": [f"title {i % 7}" for i in range(n)],
            "verdict": [str(int(i % 3 == 0)) for i in range(n)],
            "film": [f"f{i % groups}" if groups else str(i) for i in range(n)],
        }
    )


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch):
    """Puts splits in the place of a source: `source(train=..., dev=...)` gives the name to read them by."""

    def put(**result: Dataset) -> str:
        monkeypatch.setitem(READERS, "here", lambda task, folder: result)
        return "here"

    return put


def texts(full: Splits) -> list[set[str]]:
    return [set(part["text"]) for part in (full.train, full.dev, full.test)]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(30, 120), seed=st.integers(0, 99))
def test_rows_are_split_by_class_without_loss(n: int, seed: int) -> None:
    READERS["cut-test"] = lambda task, folder: {"rows": table(n)}
    try:
        task = dataclasses.replace(REVIEW, source="cut-test", split_seed=seed)
        full, repeated = splits(task), splits(task)
    finally:
        del READERS["cut-test"]
    parts = texts(full)
    assert sum(map(len, parts)) == n
    assert len(set.union(*parts)) == n
    for part, share in ((full.dev, 0.1), (full.test, 0.2)):
        for label in ("0", "1"):
            expected = share * table(n)["verdict"].count(label)
            assert abs(part["verdict"].count(label) - expected) <= 1
    assert texts(repeated) == parts
    assert repeated.fingerprint == full.fingerprint
    assert full.majority == 0


def test_group_is_in_one_split(source) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(300, groups=40)), group="film")
    full = splits(task)
    films = [set(part["film"]) for part in (full.train, full.dev, full.test)]
    assert sum(map(len, films)) == len(set.union(*films)) == 40
    assert 50 <= len(full.test) <= 80
    assert 25 <= len(full.dev) <= 45


def test_splits_follow_the_split_seed_and_not_the_runs(source) -> None:
    """Else a prompt trained with another seed would be scored on rows that it was trained on."""
    task = dataclasses.replace(REVIEW, source=source(rows=table(100)))
    assert task.split_seed == 0
    assert splits(task).fingerprint != splits(dataclasses.replace(task, split_seed=3)).fingerprint
    first, second = (read_splits(Experiment(seed=seed), task) for seed in (1, 2))
    assert first.fingerprint == second.fingerprint == splits(task).fingerprint
    few = TrainingConfig(shots=4)
    first, second = (read_splits(Experiment(seed=seed, training=few), task) for seed in (1, 2))
    assert texts(first)[2] == texts(second)[2]
    assert texts(first)[0] != texts(second)[0]


@pytest.mark.parametrize(("group", "unit"), [("", "film"), ("title", "title")])
def test_question_is_in_one_split_unless_grouped(source, group: str, unit: str) -> None:
    rows = source(rows=table(300, groups=60))
    task = dataclasses.replace(REVIEW, source=rows, question="film", group=group, metrics=("question_match",))
    full = splits(task)
    units = [set(part[unit]) for part in (full.train, full.dev, full.test)]
    assert sum(map(len, units)) == len(set.union(*units))
    few = shots(task, full, 8 if unit == "film" else 1, seed=1)
    assert not set(few.train[unit]) & set(few.dev[unit])
    source(rows=table(30, groups=2))
    if not group:
        with pytest.raises(ValueError, match="2 questions of task 'review' are too few to split"):
            splits(task)


def test_dev_and_test_with_the_same_rows_are_shared(source) -> None:
    rows = table(60)
    held = rows.select(range(20))
    parts = {"train": rows.select(range(20, 60)), "dev": held, "test": held.select(range(19, -1, -1))}
    full = splits(dataclasses.replace(REVIEW, source=source(**parts)))
    assert full.shared
    assert texts(full)[1] == set(held["text"])
    parts["test"] = held.map(lambda row, i: {"title": row["title"] + "!" * (i == 3)}, with_indices=True)
    assert not splits(dataclasses.replace(REVIEW, source=source(**parts))).shared


@pytest.mark.parametrize("name", ["dev", "validation", "test"])
def test_training_rows_as_held_out_rows_are_refused(source, name: str) -> None:
    rows = table(60)
    task = dataclasses.replace(REVIEW, source=source(**{"train": rows, name: rows.select(range(59, -1, -1))}))
    with pytest.raises(ValueError, match=rf"the {name} rows of task 'review' .* are its training rows .*; give other"):
        splits(task)


def test_rows_that_recur_in_train_are_counted(source) -> None:
    rows = table(60, groups=30)
    parts = {"train": rows.select(range(40)), "dev": rows.select(range(35, 50)), "test": rows.select(range(38, 60))}
    task = dataclasses.replace(REVIEW, source=source(**parts))
    [warning] = splits(task).warnings
    assert warning.startswith("2 of 22 test rows and 5 of 15 dev rows have the input of a training row, so a score of")
    [warning] = splits(dataclasses.replace(task, group="film")).warnings
    assert warning.startswith("22 of 22 test rows and 15 of 15 dev rows have the input or the 'film' of a training row")
    source(rows=Dataset.from_dict({name: values * 2 for name, values in rows.to_dict().items()}))
    assert "have the input of a training row" in splits(task).warnings[0]
    source(rows=rows)
    assert splits(task).warnings == ()


def test_answers_that_a_metric_takes_for_one_are_named(source) -> None:
    values = ["C", "C++", "c", "co-op", "coop", "U.S.", "US"]
    rows = Dataset.from_dict({"text": [str(i) for i in range(70)], "answer": values * 10})
    task = Task(name="t", template="{text}", target="answer", metrics=("exact_match",), source=source(rows=rows))
    [warning] = splits(task).warnings
    assert warning == (
        "exact_match of task 't' counts 'U.S.' and 'US' as one answer (one of 2 such cases); if they are not, "
        "write them so that they differ in a letter or a digit"
    )
    assert splits(dataclasses.replace(task, metrics=("squad_f1",))).warnings == ()


def test_official_validation_split_is_halved(source) -> None:
    rows = table(200)
    task = dataclasses.replace(
        REVIEW, source=source(train=rows.select(range(100)), validation=rows.select(range(100, 200)))
    )
    full = splits(task)
    assert set(full.train["text"]) == set(rows["text"][:100])
    assert set(full.dev["text"]) | set(full.test["text"]) == set(rows["text"][100:])
    assert abs(len(full.dev) - len(full.test)) <= 2


def test_existing_splits_are_unchanged(source) -> None:
    rows = table(60)
    parts = {"train": rows.select(range(20)), "dev": rows.select(range(20, 30)), "test": rows.select(range(30, 60))}
    full = splits(dataclasses.replace(REVIEW, source=source(**parts)))
    assert texts(full) == [set(part["text"]) for part in parts.values()]


def test_fingerprint_follows_the_columns_that_are_read(source) -> None:
    rows = table(60)
    task = dataclasses.replace(REVIEW, source=source(rows=rows))
    first = splits(task).fingerprint
    source(rows=rows.map(lambda row: {"film": row["film"] + "!"}, keep_in_memory=True))
    assert splits(task).fingerprint == first
    source(rows=rows.map(lambda row: {"text": row["text"] + "!"}, keep_in_memory=True))
    assert splits(task).fingerprint != first


def test_full_fingerprint_is_of_all_rows_before_they_are_sampled(source) -> None:
    rows = table(60)
    task = dataclasses.replace(REVIEW, source=source(rows=rows), split_seed=1)
    full, other = splits(task), splits(dataclasses.replace(task, split_seed=2))
    few = shots(task, full, 4, seed=1)
    assert full.full_fingerprint == few.full_fingerprint != other.full_fingerprint
    assert full.test_fingerprint == few.test_fingerprint != other.test_fingerprint
    assert len({full.fingerprint, other.fingerprint, few.fingerprint}) == 3
    source(rows=rows.select([1, 0, *range(2, 60)]))
    assert splits(task).full_fingerprint != full.full_fingerprint  # rows are split by their place in the file


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("group", ["", "film"])
def test_shots_are_few_and_disjoint(source, balanced: bool, group: str) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(300, groups=100)), group=group)
    full = splits(task)
    few = shots(task, full, 8, seed=1, balanced=balanced)
    train, dev, test = texts(few)
    assert len(train) == len(dev) == (16 if balanced else 8)
    assert not train & dev
    assert test == texts(full)[2]
    assert train | dev <= texts(full)[0]
    if balanced:
        assert Counter(few.train["verdict"]) == Counter(few.dev["verdict"]) == {"0": 8, "1": 8}
    if group:
        assert not set(few.train["film"]) & set(few.dev["film"])
    assert texts(shots(task, full, 8, seed=2, balanced=balanced))[0] != train


def test_balanced_shots_keep_the_majority_answer(source) -> None:
    """Of 8 and 8 neither is, and the first of the two would be a majority that nobody has to beat."""
    task = dataclasses.replace(REVIEW, label_words={"1": "positive", "0": "negative"}, source=source(rows=table(300)))
    full = splits(task)
    assert list(task.label_words)[full.majority] == "0"
    assert shots(task, full, 8, seed=1).majority == full.majority


def test_majority_under_f1_is_the_positive_class(source) -> None:
    """Never saying the class that counts scores nothing, however rare it is."""
    rows = source(rows=table(300))
    assert splits(dataclasses.replace(REVIEW, source=rows)).majority == 0
    assert splits(dataclasses.replace(REVIEW, source=rows, metrics=("f1", "accuracy"))).majority == 1


def test_too_many_shots_are_refused(source) -> None:
    task = dataclasses.replace(REVIEW, source=source(rows=table(60)))
    with pytest.raises(ValueError, match=r"12 shots of task 'review' need more rows of class '1': \d+ are left for"):
        shots(task, splits(task), 12, seed=0)
    with pytest.raises(ValueError, match="must be at least 1"):
        shots(task, splits(task), 0, seed=0)


def asset(name: str) -> None:
    try:
        assets.fetch(name)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"the asset {name} cannot be had here: {error}")


@pytest.mark.asset
def test_no_film_is_in_two_splits() -> None:
    asset("rotten-tomatoes")
    full = splits(TASKS["sentiment"])
    films = [set(part["movie_name"]) for part in (full.train, full.dev, full.test)]
    assert [len(full.train), len(full.dev), len(full.test)] == [8960, 1282, 2566]
    assert sum(map(len, films)) == len(set.union(*films)) == 508
    assert set(full.train["category"]) == {"fresh", "rotten"}


@pytest.mark.asset
def test_boolq_has_the_official_splits() -> None:
    asset("boolq")
    full = splits(TASKS["boolq"])
    assert [len(full.train), len(full.dev), len(full.test)] == [9427, 1635, 1635]
    assert not set(full.dev["passage"]) & set(full.test["passage"])
    # SuperGLUE's own files say: 5,874 of the training rows and 2,033 of the validation rows are answered with yes.
    assert sum(full.train["label"]) == 5874
    assert sum(full.dev["label"]) + sum(full.test["label"]) == 2033
    assert sorted(full.train["idx"]) == list(range(9427))
    assert sorted([*full.dev["idx"], *full.test["idx"]]) == list(range(3270))
    # sha256 of the sorted questions of SuperGLUE's own BoolQ/val.jsonl
    questions = "\n".join(sorted([*full.dev["question"], *full.test["question"]]))
    assert hashlib.sha256(questions.encode()).hexdigest() == (
        "a3f4cc6156c67f8249f75138c848ed0663e8750f83f46427d134d279dfc8bd6e"
    )
