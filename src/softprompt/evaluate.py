"""A prompt's score on a split: with its n, what the majority answer would score, and an interval."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from softprompt.attach import Attachment
from softprompt.backbone import Backbone
from softprompt.experiment import Experiment
from softprompt.predict import Answer, answer, input_limit
from softprompt.runs import Run
from softprompt.tasks import Example, Prediction, Score, Splits, Task, encode, load_task, score, shots, splits


def evaluate(
    run: Run,
    *,
    task: str | None = None,
    data: str | None = None,
    split: str = "test",
    backbone: Backbone | str | None = None,
) -> Score:
    """The score of a finished run on a split of its own task, or of another one.

    Args:
        task: a built-in task's name or a TOML file; none: the run's own.
        data: where the rows are, as `Experiment.data`; none: where the run had them, or where that other task says.
        split: `test`, `dev` or `train`.
        backbone: the run's own, loaded or as `load_backbone` takes it; none: where the run had it.

    Raises:
        ValueError: an unknown split, or one that the task has not.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be train, dev or test")
    experiment = run.experiment
    chosen = load_task(task) if task else run.task
    if task is None:
        rows = read_splits(experiment if data is None else experiment.replace(data=data), chosen)
    else:
        rows = splits(chosen, data, experiment.seed)
    if not len(getattr(rows, split)):
        raise ValueError(f"task {chosen.name!r} has no {split} rows; it can only be scored on its test split")
    backbone = run.backbone(backbone)
    attachment = run.attachment(backbone)
    limit = input_limit(attachment, chosen, experiment.training)
    examples = encode(chosen, backbone.tokenizer, getattr(rows, split), limit, closing=attachment.closed)[0]
    return score_examples(attachment, chosen, rows, split, examples, experiment.training.max_new_tokens)[0]


def read_splits(experiment: Experiment, task: Task) -> Splits:
    """The task's rows as the experiment wants them, few-shot draws included.

    Raises:
        ValueError: the task can only be scored.
    """
    rows, training = splits(task, experiment.data, experiment.seed, experiment.protocol), experiment.training
    if not len(rows.train):
        raise ValueError(
            f"task {task.name!r} has no training rows; train on another task, and score that run with: "
            f"softprompt evaluate RUN --task {task.name}"
        )
    return shots(task, rows, training.shots, experiment.seed, training.shots_balanced) if training.shots else rows


def score_examples(
    attachment: Attachment,
    task: Task,
    rows: Splits,
    split: str,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> tuple[Score, list[Answer]]:
    """The attachment's score on `examples` of a split, and its answers."""
    answers = answer(attachment, task, examples, max_new_tokens=max_new_tokens)
    return score_answers(task, rows, split, examples, answers), answers


def score_answers(
    task: Task, rows: Splits, split: str, examples: Sequence[Example], answers: Sequence[Answer]
) -> Score:
    """The score of answers that are there already, one an example."""
    given, golds, questions = beside_golds(task, getattr(rows, split), examples, answers)
    return score(task, given, golds, questions, majority=rows.majority)


def beside_golds(
    task: Task, table: Dataset, examples: Sequence[Example], answers: Sequence[Answer]
) -> tuple[list[Prediction], list[Any], list[Any] | None]:
    """What was answered, what is right, and where the task has questions the question of each row."""
    golds: list[Any] = []
    questions: list[Any] = []
    for example in examples:
        golds.append(task.golds(table[example.row]) if example.label is None else example.label)
        questions.append(table[example.row][task.question] if task.question else None)
    given: list[Prediction] = [found.index if task.is_classification else found.text for found in answers]
    return given, golds, questions if task.question else None


def draw(task: Task, table: Dataset, examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` of the examples (0: all), drawn without replacement by `seed`, in their order.

    Where the task has questions they are drawn whole, until there are `count` rows: a metric of whole questions would
    otherwise find it easy to be right about what is left of one.
    """
    if not count or count >= len(examples):
        return list(examples)
    chooser = random.Random(seed)
    if not task.question:
        return [examples[place] for place in sorted(chooser.sample(range(len(examples)), count))]
    questions = table[task.question][:]
    members: dict[Any, list[int]] = {}
    for place, example in enumerate(examples):
        members.setdefault(questions[example.row], []).append(place)
    order, chosen = list(members), list[int]()
    chooser.shuffle(order)
    for question in order:
        if len(chosen) >= count:
            break
        chosen += members[question]
    return [examples[place] for place in sorted(chosen)]
