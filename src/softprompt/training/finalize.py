"""The end of a training run: evaluate the trained prompt and write the run's folder, its record last."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from softprompt import files, runs
from softprompt.evaluation.distillation import GeneratingModel, compare_with_teacher
from softprompt.evaluation.evaluate import prediction_record, score_answers
from softprompt.evaluation.predict import Answer
from softprompt.export import export_model
from softprompt.models import PromptedModel, attach
from softprompt.models.teacher import Teacher
from softprompt.runs import Run, model_card
from softprompt.tasks import Score
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.splits import SAME_ROWS
from softprompt.training.callbacks import TrainingCallback
from softprompt.training.checkpoint import TrainerState
from softprompt.training.setup import TrainingSetup

Predict = Callable[[PromptedModel, Sequence[Example]], list[Answer]]
"""Answers examples, in their order."""


def evaluate_final(
    run: Run, setup: TrainingSetup, state: TrainerState, predict: Predict, callback: TrainingCallback
) -> tuple[dict[str, Any], list[Answer]]:
    """The results of the folded prompt as the run's record has them, and its answers on the test rows."""

    def score(split: str, examples: Sequence[Example], answers: list[Answer]) -> Score:
        return score_answers(run.task, setup.rows, split, examples, answers, setup.backbone.tokenizer)

    callback.on_stage("testing")
    folded = setup.prompted.folded()
    dev = score("dev", setup.dev, predict(folded, setup.dev))
    answers = predict(folded, setup.test)
    test = score("test", setup.test, answers)
    # The score's other fields (interval, further metrics, warning) keep their own names.
    results = {name: value for name, value in dataclasses.asdict(test).items() if name not in ("value", "n")}
    results |= {
        "dev": dev.value,
        "test": test.value,
        "n_dev": dev.n,
        "n_test": test.n,
        "protocol": run.experiment.protocol,
        "trainable": sum(parameter.numel() for parameter in setup.prompted.parameters()),
    }
    if setup.teacher is not None:
        callback.on_stage("comparing with the teacher")
        results["distillation"] = _distillation(run, setup, folded, setup.teacher)
    if setup.rows.shared:
        results["selection_warning"] = SAME_ROWS
        callback.on_note(SAME_ROWS)
    if run.experiment.training.zero_shot:
        callback.on_stage("testing zero-shot")
        zero_shot = score("test", setup.test, predict(attach(setup.backbone), setup.test))
        results["zero_shot"] = zero_shot.value
    progress = {"steps": state.step, "best_step": state.best_step, "seconds": round(state.seconds, 3)}
    return results | progress, answers


def _distillation(run: Run, setup: TrainingSetup, folded: PromptedModel, teacher: Teacher) -> dict[str, Any]:
    """Compare the prompt with the teacher on the test rows; baselines are no context and a truncated context."""
    length, settings = folded.prompt_length, run.experiment.training
    models: dict[str, GeneratingModel] = {"prompt": folded, "no_context": teacher.model}
    for name, from_end in (("context_start", False), ("context_end", True)):
        if (shortened := teacher.shortened(length, from_end=from_end)) is not None:
            models[name] = shortened
    comparisons = compare_with_teacher(models, teacher, folded, run.task, setup.test, settings.max_new_tokens)
    results: dict[str, Any] = {"context_tokens": len(teacher.context), "prompt_tokens": length}
    for name, comparison in comparisons.items():
        score = score_answers(run.task, setup.rows, "test", setup.test, comparison.answers, setup.backbone.tokenizer)
        results[name] = {"kl": comparison.kl, "agreement": comparison.agreement, "score": score.value}
    return results


def save_run(
    run: Run, setup: TrainingSetup, answers: Sequence[Answer], results: dict[str, Any], callback: TrainingCallback
) -> Run:
    """Write predictions, tensors, PEFT files, the README and the record of a finished run."""
    lines = (
        runs.json_line(prediction_record(run.task, setup.rows.test, "test", example, answer, setup.backbone.tokenizer))
        for example, answer in zip(setup.test, answers, strict=True)
    )
    files.write_text(run.folder / runs.PREDICTIONS, "".join(lines))
    peft_problem = export_model(setup.prompted.folded(), run.folder)
    if note := model_card.write(run, setup.prompted, results, peft_problem):
        callback.on_note(note)
    return run.finish(setup.prompted, results)
