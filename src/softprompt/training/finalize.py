"""The end of a training: what was trained is tested, and written down with the record last."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from softprompt import files, runs
from softprompt.evaluation.evaluate import prediction_line, score_answers
from softprompt.evaluation.predict import Answer
from softprompt.export import export_model
from softprompt.models import PromptedModel
from softprompt.runs import Run, model_card
from softprompt.tasks import SAME_ROWS, Example, Splits, Task


def evaluate_final(
    run: Run,
    trained: PromptedModel,
    rows: Splits,
    dev: Sequence[Example],
    test: Sequence[Example],
    answers_of: Callable[[PromptedModel, Sequence[Example]], list[Answer]],
) -> tuple[dict[str, Any], list[Answer]]:
    """The results of the folded prompt, and its answers on the test rows."""
    finished = trained.folded()
    chosen = score_answers(run.task, rows, "dev", dev, answers_of(finished, dev), trained.backbone.tokenizer)
    answers = answers_of(finished, test)
    score = score_answers(run.task, rows, "test", test, answers, trained.backbone.tokenizer)
    # Whatever else a score says of itself (its interval, further metrics, a warning) is kept under its own name.
    said = {name: value for name, value in dataclasses.asdict(score).items() if name not in ("value", "n")}
    results = said | {
        "dev": chosen.value,
        "test": score.value,
        "n_dev": chosen.n,
        "n_test": score.n,
        "protocol": run.experiment.protocol,
        "trainable": sum(parameter.numel() for parameter in trained.parameters()),
    }
    if score.warning:
        results["warning"] = score.warning
    return (results | {"caution": SAME_ROWS} if rows.shared else results), answers


def save_run(
    run: Run,
    trained: PromptedModel,
    rows: Splits,
    test: Sequence[Example],
    answers: Sequence[Answer],
    results: Mapping[str, Any],
) -> Run:
    """Everything that a finished run's folder holds."""
    files.write_text(
        run.folder / runs.PREDICTIONS, "".join(_lines(run.task, rows, test, answers, trained.backbone.tokenizer))
    )
    model_card.write(run, trained, results, export_model(trained.folded(), run.folder))
    return run.finish(trained, results)


def _lines(
    task: Task, rows: Splits, examples: Sequence[Example], answers: Sequence[Answer], tokenizer: Any
) -> Iterator[str]:
    for example, found in zip(examples, answers, strict=True):
        yield runs.json_line(prediction_line(task, rows.test, "test", example, found, tokenizer))
