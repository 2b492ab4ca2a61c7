"""A prompt's score on a split: with its n, what the majority answer would score, and an interval."""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from softprompt.attach import Attachment
from softprompt.backbone import Backbone, load
from softprompt.predict import Answer, answer, input_limit
from softprompt.runs import Run
from softprompt.tasks import Example, Score, Splits, Task, encode, load_task, score, splits


def evaluate(run: Run, *, task: str | None = None, split: str = "test", backbone: Backbone | None = None) -> Score:
    """The score of a finished run on a split of its own task, or of another one.

    Args:
        task: a built-in task's name or a TOML file; none: the run's own.
        split: `test`, `dev` or `train`.
        backbone: the run's own, if it is loaded already.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be train, dev or test")
    backbone = backbone or load(run.experiment.backbone, dtype=run.experiment.backbone_dtype)
    chosen = load_task(task) if task else run.task
    rows = splits(chosen, run.experiment.data if task is None else None, run.experiment.seed)
    limit = input_limit(chosen, run.experiment.training.max_tokens)
    attachment = run.attachment(backbone)
    examples = encode(chosen, backbone.tokenizer, getattr(rows, split), limit, closing=attachment.closed)[0]
    return score_examples(attachment, chosen, rows, split, examples)


def score_examples(
    attachment: Attachment, task: Task, rows: Splits, split: str, examples: Sequence[Example], batch: int = 32
) -> Score:
    """The attachment's score on `examples` of a split."""
    return score_answers(task, rows, split, examples, list(answer(attachment, task, examples, batch=batch)))


def score_answers(
    task: Task, rows: Splits, split: str, examples: Sequence[Example], answers: Sequence[Answer]
) -> Score:
    """The score of answers that are there already, one an example."""
    table = getattr(rows, split)
    golds: list[Any] = []
    questions: list[Any] = []
    for example in examples:
        golds.append(task.golds(table[example.row]) if example.label is None else example.label)
        questions.append(table[example.row][task.question] if task.question else None)
    given = [found.index if task.is_classification else found.text for found in answers]
    return score(task, given, golds, questions if task.question else None, majority=rows.majority)


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` of the examples (0: all), drawn without replacement by `seed`, in their order."""
    if not count or count >= len(examples):
        return list(examples)
    return [examples[place] for place in sorted(random.Random(seed).sample(range(len(examples)), count))]


def score_json(found: Score) -> dict[str, Any]:
    """A score as plain values."""
    return asdict(found)
