"""Metrics of whole questions, and of referents: their values, and samples that keep questions complete."""

import dataclasses
from pathlib import Path

import pytest

from softprompt.evaluation.evaluate import sample_examples
from softprompt.tasks import METRICS, TASKS, Answers, score
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.splits import splits
from softprompt.tasks.metrics.texts import referent_match


def test_multirc_is_scored_by_answer_and_question(superglue: Path) -> None:
    """Ten answers to eight questions; one answer of the first question is wrong."""
    rows = splits(TASKS["multirc"], str(superglue)).train.select(range(10))
    golds = [int(label) for label in rows["label"]]
    ours = list(golds)
    ours[0] = 1 - ours[0]
    questions = list(rows["question_id"])
    result = score(TASKS["multirc"], ours, golds, questions, majority=0, resamples=20)
    assert golds == [1, 0, 1, 1, 0] * 2
    assert questions[:5] == ["0-0", "0-0", "0-1", "1-2", "2-3"]
    assert result.extra_metrics["question_match"] == pytest.approx(7 / 8)
    # 5 true positives, 1 missed
    assert result.value == pytest.approx(2 * 5 / (2 * 5 + 1))
    assert result.majority == pytest.approx(2 * sum(golds) / (len(golds) + sum(golds)))  # of always saying that it is


def test_gender_parity_compares_predictions_only() -> None:
    """Pair 0 is answered alike and wrong, pair 1 differently, pair 2 alike and right."""
    answers = Answers(predictions=[0, 1, 0, 0, 0, 0], golds=[1, 1, 1, 0, 1, 0], questions=[0, 1, 0, 2, 1, 2])
    assert METRICS["gender_parity"](answers) == pytest.approx(2 / 3)
    assert METRICS["question_match"](answers) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("prediction", "gold", "matches"),
    [
        ("fuzzy bunny", "The bunny", 1.0),
        ("the bunny", "the fuzzy bunny", 1.0),
        ("Bob", "Bob's hat", 0.0),
        ("Bob's", "Bob's hat", 1.0),
        ("the", "the bunny", 0.0),
        ("", "the bunny", 0.0),
        ("a bunny rabbit", "fuzzy bunny", 0.0),
    ],
)
def test_referent_match_compares_words(prediction: str, gold: str, matches: float) -> None:
    assert referent_match(prediction, gold) == matches


def test_draw_keeps_questions_complete(superglue: Path) -> None:
    task = TASKS["multirc"]
    table = splits(task, str(superglue)).train
    examples = [Example((1,), (1,), 0, row) for row in range(len(table))]
    drawn = sample_examples(task, table, examples, 7, seed=1)
    selected = {table["question_id"][example.row] for example in drawn}
    assert 7 <= len(drawn) <= 9
    assert [example.row for example in drawn] == [
        row for row in range(len(table)) if table["question_id"][row] in selected
    ]
    assert sample_examples(task, table, examples, 7, seed=2) != drawn
    free = dataclasses.replace(task, question="", metrics=("f1",))
    assert len(sample_examples(free, table, examples, 7, seed=1)) == 7
