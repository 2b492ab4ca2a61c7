"""A prompt's score on a split or a file: with its n, what the majority answer would score, and an interval."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from softprompt.backbones import Backbone
from softprompt.config import Experiment
from softprompt.evaluation.predict import Answer, answer, input_limit
from softprompt.models import PromptedModel
from softprompt.runs import Run, resolve_run
from softprompt.tasks import (
    METRICS,
    Example,
    Prediction,
    Score,
    Splits,
    Task,
    answer_ids,
    encode,
    given_rows,
    load_task,
    read_answers,
    row_id,
    row_number,
    score,
    shots,
    splits,
    strip_end,
)


def evaluate(
    run: Run | str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    split: str | None = None,
    backbone: Backbone | str | None = None,
) -> Score:
    """The score of a finished run on a split of its own task, on another task, or on all rows of a file.

    Args:
        run: a run, or its folder.
        task: a built-in task's name or a TOML file; none: the run's own.
        data: a file (of images also a folder of class folders), all of whose rows are scored; or the official folder
            of a built-in task, of which the split is scored. None: the rows that the run had, or those of `task`.
        split: `test` (the default), `dev` or `train`; not with a file, which is scored whole.
        backbone: the run's own, loaded or as `load_backbone` takes it; none: where the run had it.

    Raises:
        FileNotFoundError: the rows are no longer where the run had them, or there is no `data`.
        ValueError: an unknown split, one that the task has not, or one of a file; or the run's rows have changed.
    """
    if split not in (None, "train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be train, dev or test")
    run = resolve_run(run)
    experiment = run.experiment
    chosen = load_task(task) if task else run.task
    rows, split = _rows_to_score(run, chosen, data, split, own=task is None)
    if not len(getattr(rows, split)):
        raise ValueError(f"task {chosen.name!r} has no {split} rows; it can only be scored on its test split")
    backbone = run.backbone(backbone)
    prompted = run.prompted(backbone)
    _refuse_other_classes(run, prompted, chosen)
    limit = input_limit(prompted, chosen, experiment.training)
    if chosen.is_classification:
        prompted.check_candidates(chosen.answers, answer_ids(chosen, backbone.tokenizer))
    examples = encode(chosen, backbone.tokenizer, getattr(rows, split), limit, closing=prompted.appends_eos)[0]
    for example in examples:  # an answer is compared as a text here, and need not fit
        prompted.check_row(example.input_ids, (), example.where)
    return score_examples(prompted, chosen, rows, split, examples, experiment.training.max_new_tokens)[0]


def _rows_to_score(run: Run, task: Task, data: str | None, split: str | None, *, own: bool) -> tuple[Splits, str]:
    """The rows, and which of the three splits they are."""
    experiment = run.experiment
    if data is not None and (whole := given_rows(task, data, split)) is not None:
        return whole, "test"
    if own and data is None:
        rows = run_splits(run)
    elif own:
        rows = read_splits(experiment.replace(data=data), task)
    else:
        rows = splits(task, data, experiment.seed)
    return rows, split or "test"


def _refuse_other_classes(run: Run, prompted: PromptedModel, task: Task) -> None:
    """A trained head knows its classes by their number: those of another task may be others, or in another order."""
    trained, asked = (list(one.label_words.values()) for one in (run.task, task))
    if prompted.head is not None and trained != asked:
        raise ValueError(
            f"run {run.folder} answers through a head trained for {', '.join(trained)}, and task {task.name!r} has "
            f"{', '.join(asked) or 'no labels'}; score it on a task with the same words in the same order"
        )


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


def run_splits(run: Run) -> Splits:
    """The rows of a run as it was started with them.

    Raises:
        FileNotFoundError: they are no longer where the run had them.
        ValueError: the rows have changed: in new splits, rows that the run was trained on may be among the test rows.
    """
    place = run.experiment.data or ", ".join(run.task.files.values()) or run.experiment.task
    remedy = "or score all rows of another file with: softprompt evaluate RUN --data FILE"
    try:
        rows = read_splits(run.experiment, run.task)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the rows of run {run.folder} are not where it recorded them ({place}): {error}; put them back, {remedy}"
        ) from None
    if rows.fingerprint != run.record["data"]:
        raise ValueError(
            f"the rows of {place} are not those that run {run.folder} was started with, so its test rows are not known "
            f"any more; put them back, {remedy}"
        )
    return rows


def score_examples(
    prompted: PromptedModel,
    task: Task,
    rows: Splits,
    split: str,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> tuple[Score, list[Answer]]:
    """The attachment's score on `examples` of a split, and its answers."""
    answers = answer(prompted, task, examples, max_new_tokens=max_new_tokens)
    return score_answers(task, rows, split, examples, answers, prompted.backbone.tokenizer), answers


def score_answers(
    task: Task, rows: Splits, split: str, examples: Sequence[Example], answers: Sequence[Answer], tokenizer: Any
) -> Score:
    """The score of answers that are there already, one an example."""
    given, golds, questions = beside_golds(task, getattr(rows, split), examples, answers, tokenizer)
    majority = rows.majority if isinstance(rows.majority, int) else strip_end(rows.majority, tokenizer)
    return score(task, given, golds, questions, majority=majority if len(rows.train) else None)


def beside_golds(
    task: Task, table: Dataset, examples: Sequence[Example], answers: Sequence[Answer], tokenizer: Any
) -> tuple[list[Prediction], list[Any], list[Any] | None]:
    """What was answered, what is right, and where the task has questions the question of each row.

    What is right in a generation is without the end of sequence that the row's text may end with.
    """
    golds: list[Any] = []
    questions: list[Any] = []
    for example in examples:
        if example.label is None:
            golds.append(tuple(strip_end(text, tokenizer) for text in task.golds(table[example.row])))
        else:
            golds.append(example.label)
        questions.append(table[example.row][task.question] if task.question else None)
    given: list[Prediction] = [found.index if task.is_classification else found.text for found in answers]
    return given, golds, questions if task.question else None


def prediction_line(
    task: Task, table: Dataset, split: str, example: Example, found: Answer, tokenizer: Any
) -> dict[str, Any]:
    """A line of `predictions.jsonl`: the row's number in its file, counted from 1, its id, what was said and is right.

    The id is the cell of a column `id` (or `idx`, `guid`, `uuid`), else the first of a hash of the row's input.
    """
    row = table[example.row]
    if example.label is not None:
        gold: str | list[str] = list(task.label_words)[example.label]
    else:
        gold = [strip_end(text, tokenizer) for text in task.golds(row, example.where)]
    line = {
        "row": row_number(row, example.row),
        "id": row_id(task, row),
        "split": split,
        "answer": found.label or found.text,
        "gold": gold,
    }
    return {**line, "probabilities": dict(found.probabilities)} if found.label else line


def is_right(task: Task, answer: str, gold: str | Sequence[str]) -> bool:
    """Whether the task's first metric counts an answer as fully right, by itself.

    Args:
        answer: a label or a text, as `Run.predictions` has it.
        gold: the label, or every accepted text.
    """
    if task.is_classification:
        return answer == gold
    name = task.metrics[0]
    read = read_answers(task, name, [answer], [(gold,) if isinstance(gold, str) else tuple(gold)])
    if METRICS[name].of == "numbers":  # whose metrics say nothing of a single row
        return bool(read.predictions[0] == read.golds[0])
    return METRICS[name](read) >= 1


def draw(task: Task, table: Dataset, examples: Sequence[Example], count: int, seed: int) -> Sequence[Example]:
    """`count` of the examples (0: all), drawn without replacement by `seed`, in their order.

    Where the task has questions they are drawn whole, until there are `count` rows: a metric of whole questions would
    otherwise find it easy to be right about what is left of one.
    """
    if not count or count >= len(examples):
        return examples
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
