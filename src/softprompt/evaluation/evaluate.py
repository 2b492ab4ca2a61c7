"""Score a prompt on a split or a file: the metric with its n, its interval and the majority answer's score."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from softprompt.backbones import Backbone
from softprompt.config import Experiment
from softprompt.evaluation.predict import Answer, answer, check_generates, encode_rows
from softprompt.models import PromptedModel
from softprompt.runs import PeftPrompt, Run, resolve_prompt
from softprompt.tasks import METRICS, Prediction, Score, Task, read_answers, score
from softprompt.tasks.data.context import split_demonstrations
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.splits import SAME_ROWS, Splits, load_test_split, shots, splits
from softprompt.tasks.data.tabular import row_id, row_number
from softprompt.tasks.data.tokenize import strip_end
from softprompt.tasks.metrics import Pooled
from softprompt.tasks.user import load_task
from softprompt.types import DecodeWeights


def evaluate(
    run: Run | PeftPrompt | str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    split: str | None = None,
    backbone: Backbone | str | None = None,
    generate: bool = False,
    decode_weights: DecodeWeights = "auto",
) -> Score:
    """Score a finished run on a split of its task, on another task, or on all rows of a file.

    Args:
        run: a run, its folder, or a stock PEFT prompt folder.
        task: a built-in task's name or a TOML file; None for the run's task. A PEFT folder needs one.
        data: a file (for images also a folder of class folders), all of whose rows are scored; or the official folder
            of a built-in task, of which `split` is scored; None for the run's rows, or those of `task`.
        split: `test` (the default), `dev` or `train`; not with a file, all of whose rows are scored.
        backbone: the run's backbone, loaded or as a source for `load_backbone`; None to load it from where the run
            recorded it.
        generate: in classification, also let the model generate freely, as an engine that knows nothing of the label
            words would: `extra_metrics` then has `label_word_rate`, the share of rows whose text begins with a label
            word, and `generated_accuracy`, the share that begins with the right one.
        decode_weights: the weights that generation reads, as `Backbone.with_decode_weights`; `auto` leaves them to the
            backbone.

    Raises:
        FileNotFoundError: the rows are no longer where the run recorded them, or `data` does not exist.
        ValueError: an unknown split, one that the task lacks, or a split given with a file; the run's rows have
            changed; a PEFT folder without a task, or that a folded prompt cannot express; `generate` for a task that is
            generated anyway, or a model that answers through a head; or `decode_weights` where nothing is generated, or
            where it does not fit the backbone.

    Warns:
        TruncationWarning: rows were cut to the input's limit, as in training; it has their number.
    """
    if split not in (None, "train", "dev", "test"):
        raise ValueError(f"split is {split!r}; it must be train, dev or test")
    run = resolve_prompt(run, task)
    scored_task = load_task(task) if task else run.task
    if not generate:
        check_generates(scored_task, decode_weights)
    runs_rows = run if task is None and isinstance(run, Run) else None
    rows, split = rows_to_score(scored_task, runs_rows, data, split)
    backbone = run.load_backbone(backbone)
    if decode_weights != "auto":
        backbone = backbone.with_decode_weights(decode_weights)
    prompted = run.prompted(backbone)
    _check_classes(run, prompted, scored_task)
    if generate:
        _check_generate(prompted, scored_task)
    examples = encode_rows(prompted, scored_task, getattr(rows, split), run.experiment.training)
    max_new_tokens = run.experiment.training.max_new_tokens
    result = score_examples(prompted, scored_task, rows, split, examples, max_new_tokens)[0]
    if not generate:
        return result
    answers = answer(prompted, scored_task, examples, max_new_tokens=max_new_tokens, generate=True)
    correct = sum(reply.index == example.label for reply, example in zip(answers, examples, strict=True))
    generated = {
        "label_word_rate": sum(reply.index >= 0 for reply in answers) / len(answers),
        "generated_accuracy": correct / len(answers),
    }
    return dataclasses.replace(result, extra_metrics={**result.extra_metrics, **generated})


def _check_generate(prompted: PromptedModel, task: Task) -> None:
    if not task.is_classification:
        raise ValueError(f"generate is on, but the answers of task {task.name!r} are generated anyway; leave it out")
    if not prompted.generates:
        raise ValueError(
            f"generate is on, but {prompted.backbone.source} does not generate text; leave it out, or use a decoder or "
            "an encoder-decoder"
        )


def rows_to_score(
    task: Task, run: Run | None, data: str | None, split: str | None, default: str = "test"
) -> tuple[Splits, str]:
    """The rows to score and their split's name; all rows of a file are its test split.

    Args:
        task: the task that is scored.
        run: the run, if its own task is scored; its rows are then those it was started with, unless `data` is given.
        data: a file, or the official folder of a built-in task; None for the rows of the run, or of the task.
        split: the split to score; None for `default`, and for a file.

    Raises:
        FileNotFoundError: the rows are no longer where the run recorded them, or `data` does not exist.
        ValueError: the split has no rows, or is given with a file; or the run's rows have changed.
    """
    if data is not None and (file_rows := load_test_split(task, data, split)) is not None:
        return file_rows, "test"
    rows, split = splits(task, data) if run is None else splits_of(run, data), split or default
    if not len(getattr(rows, split)):
        raise ValueError(f"task {task.name!r} has no {split} rows; it can only be scored on its test split")
    return rows, split


def splits_of(run: Run, data: str | None = None) -> Splits:
    """The rows that a run was started with, or those that it would have with other `data`.

    Raises:
        FileNotFoundError, ValueError: as `run_splits`, or as `read_splits` for other data.
    """
    return run_splits(run) if data is None else read_splits(run.experiment.replace(data=data), run.task)


def _check_classes(run: Run | PeftPrompt, prompted: PromptedModel, task: Task) -> None:
    """Check that a trained head fits the task: its classes are indices, so label words and their order must match."""
    trained, scored = list(run.task.label_words.values()), list(task.label_words.values())
    if prompted.head is not None and trained != scored:
        raise ValueError(
            f"run {run.folder} answers through a head trained for {', '.join(trained)}, but task {task.name!r} has "
            f"{', '.join(scored) or 'no labels'}; score it on a task with the same label words in the same order"
        )


def read_splits(experiment: Experiment, task: Task) -> Splits:
    """The task's rows as the experiment asks for them, few-shot samples included.

    Raises:
        ValueError: the task can only be scored.
    """
    rows, training = splits(task, experiment.data, experiment.protocol), experiment.training
    if not len(rows.train):
        raise ValueError(
            f"task {task.name!r} has no training rows; train on another task, and score that run with: "
            f"softprompt evaluate RUN --task {task.name}"
        )
    if training.shots:
        rows = shots(task, rows, training.shots, experiment.seed, training.shots_balanced)
    count = experiment.demonstrations
    return split_demonstrations(task, rows, count, experiment.seed) if count else rows


def run_splits(run: Run) -> Splits:
    """The rows that a run was started with.

    Raises:
        FileNotFoundError: they are no longer where the run recorded them.
        ValueError: they have changed, so that training rows may now be among the test rows.
    """
    source = run.experiment.data or ", ".join(run.task.files.values()) or run.experiment.task
    remedy = "or score all rows of another file with: softprompt evaluate RUN --data FILE"
    try:
        rows = read_splits(run.experiment, run.task)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the rows of run {run.folder} are not where it recorded them ({source}): {error}; put them back, {remedy}"
        ) from None
    if rows.fingerprint != run.record["data"]["splits"]:
        raise ValueError(
            f"the rows of {source} are not those that run {run.folder} was started with, so its test rows are not "
            f"known any more; put them back, {remedy}"
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
    """The prompted model's score on `examples` of a split, and its answers.

    The score's warning also says if these rows selected the checkpoint.
    """
    answers = answer(prompted, task, examples, max_new_tokens=max_new_tokens)
    result = score_answers(task, rows, split, examples, answers, prompted.backbone.tokenizer)
    if rows.shared and split != "train":
        result = dataclasses.replace(result, warning=f"{result.warning}; {SAME_ROWS}" if result.warning else SAME_ROWS)
    return result, answers


def score_answers(
    task: Task, rows: Splits, split: str, examples: Sequence[Example], answers: Sequence[Answer], tokenizer: Any
) -> Score:
    """The score of answers, one per example."""
    predictions, golds, questions = predictions_and_golds(task, getattr(rows, split), examples, answers, tokenizer)
    majority = rows.majority if isinstance(rows.majority, int) else strip_end(rows.majority, tokenizer)
    return score(task, predictions, golds, questions, majority=majority if len(rows.train) else None)


def predictions_and_golds(
    task: Task, table: Dataset, examples: Sequence[Example], answers: Sequence[Answer], tokenizer: Any
) -> tuple[list[Prediction], list[Any], list[Any] | None]:
    """Predictions, golds, and the question of each row if the task has questions.

    Golds of a generation are without the end-of-sequence token that a row's text may end with.
    """
    golds: list[Any] = []
    questions: list[Any] = []
    for example in examples:
        if example.label is None:
            golds.append(tuple(strip_end(text, tokenizer) for text in task.golds(table[example.row])))
        else:
            golds.append(example.label)
        questions.append(table[example.row][task.question] if task.question else None)
    predictions: list[Prediction] = [answer.index if task.is_classification else answer.text for answer in answers]
    return predictions, golds, questions if task.question else None


def prediction_record(
    task: Task, table: Dataset, split: str, example: Example, answer: Answer, tokenizer: Any
) -> dict[str, Any]:
    """A record of `predictions.jsonl`: the row's number in its file (from 1), its id, the answer and the gold.

    The id is the value of a column `id` (or `idx`, `guid`, `uuid`), else a prefix of a hash of the row's input.
    """
    row = table[example.row]
    if example.label is not None:
        gold: str | list[str] = list(task.label_words)[example.label]
    else:
        gold = [strip_end(text, tokenizer) for text in task.golds(row, example.where)]
    record = {
        "row": row_number(row, example.row),
        "id": row_id(task, row),
        "split": split,
        "answer": answer.label or answer.text,
        "gold": gold,
    }
    return {**record, "probabilities": dict(answer.probabilities)} if answer.label else record


def is_correct(task: Task, answer: str, gold: str | Sequence[str]) -> bool:
    """Whether the task's first metric gives the full score to an answer on its own.

    Args:
        answer: a label or a text, as in `Run.predictions`.
        gold: the label, or every accepted text.
    """
    if task.is_classification:
        return answer == gold
    name = task.metrics[0]
    answers = read_answers(task, name, [answer], [(gold,) if isinstance(gold, str) else tuple(gold)])
    if METRICS[name].answer_kind == "numbers":  # correlations are undefined for a single row
        return bool(answers.predictions[0] == answers.golds[0])
    if isinstance(METRICS[name], Pooled):  # BLEU is 0 for fewer than four words, even if they are right
        return answer in answers.golds[0]
    return METRICS[name](answers) >= 1


def sample_examples(
    task: Task, table: Dataset, examples: Sequence[Example], count: int, seed: int
) -> Sequence[Example]:
    """`count` examples (0 for all), sampled without replacement by `seed`, in their original order.

    If the task has questions, all rows of a question are sampled together, until there are `count` rows: a metric over
    questions would be too easy if only some of their rows were scored.
    """
    if not count or count >= len(examples):
        return examples
    generator = random.Random(seed)
    if not task.question:
        return [examples[index] for index in sorted(generator.sample(range(len(examples)), count))]
    questions = table[task.question][:]
    members: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        members.setdefault(questions[example.row], []).append(index)
    order, sampled = list(members), list[int]()
    generator.shuffle(order)
    for question in order:
        if len(sampled) >= count:
            break
        sampled += members[question]
    return [examples[index] for index in sorted(sampled)]
