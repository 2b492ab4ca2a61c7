"""Distil a context over a user's own requests: the teacher answers them, and a prompt is trained to answer like it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt import files, runs
from softprompt.backbones import Backbone, load
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.distillation import answers_of
from softprompt.models.teacher import Teacher
from softprompt.runs import Run
from softprompt.tasks import Task
from softprompt.tasks.conversation import without_answer
from softprompt.tasks.data.tabular import read_rows
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.template import parse
from softprompt.training.callbacks import NullCallback, TrainingCallback
from softprompt.training.context import check_after_context, make_teacher, read_context
from softprompt.training.self_study import write_queries
from softprompt.training.trainer import train

_BATCH = 16


def distil(
    experiment: Experiment,
    queries: str | Path | None,
    template: str = "",
    *,
    messages: str = "",
    self_study: int = 0,
    out: str | Path = "runs",
    name: str | None = None,
    backbone: Backbone | None = None,
    callback: TrainingCallback | None = None,
) -> Run:
    """Train a prompt that makes the frozen model answer as if it had read the experiment's `context`.

    The model reads the context before each query and writes an answer (greedy, at most `training.max_new_tokens`); the
    queries with these answers are then an ordinary task of written answers, cut into training, development and test
    rows. They are kept in `out/teacher-HASH` and used again for the same model, context, template and queries.

    Queries are rows of a template, or conversations. In these the context is the system message, and an answer at the
    end is not read. Beside them or instead of them, the model can write its own (`self_study.write_queries`).

    Args:
        experiment: `context` is the file to distil; `task` and `data` are replaced.
        queries: a table of requests; no answers are needed. None: self-study only.
        template: the input's text, with the table's columns in braces; empty for conversations.
        messages: the column of the conversations.
        self_study: the number of queries that the model writes; with a template, of one column.
        out: the folder that holds the runs.
        name: the run's folder in it; None: made from the table's name, method and seed.
        backbone: the experiment's backbone, if it is already loaded.
        callback: receives the progress.

    Raises:
        FileNotFoundError: there is no context or table.
        ValueError: both or neither of template and messages, neither queries nor self-study, an empty context, a table
            without the columns, a model that writes no queries or no answers, or as `train` raises.
    """
    callback = callback or NullCallback()
    out = Path(out).expanduser()
    runs.check_new_run(out, name)
    if experiment.context is None or experiment.demonstrations:
        raise ValueError(
            "distil takes its context from a file; give one with --context (labeled rows as a context: "
            "softprompt train --demonstrations N)"
        )
    if bool(template) == bool(messages):
        raise ValueError(
            f"distil has {'both' if template else 'neither'} of template and messages; give --template for a table of "
            "columns, or --messages with the column of conversations"
        )
    if self_study < 0 or (queries is None and not self_study):
        raise ValueError(
            f"self_study is {self_study} and there are {'no ' if queries is None else ''}queries; give a table with "
            "--queries, or the number of queries that the model is to write"
        )
    path = Path(queries or experiment.context).expanduser()
    task = _task(path, template, messages)
    if self_study and len(task.inputs) != 1:
        raise ValueError(
            f"self_study is on, but the template {template!r} has {len(task.inputs)} columns; a written query fills one"
        )
    rows = [] if queries is None else _read_queries(path, task)
    experiment = experiment.with_absolute_paths()
    context = read_context(experiment)
    backbone = backbone or load(experiment.backbone, dtype=experiment.backbone_dtype)
    settings = experiment.training
    key: list[Any] = [backbone.hash, context, template, settings.max_input_tokens, settings.max_new_tokens]
    if messages:
        key += [messages, [task.conversation(row) for row in rows], getattr(backbone.tokenizer, "chat_template", None)]
    else:
        key += [[task.render(row) for row in rows]]
    key += ["self-study", self_study, experiment.seed] if self_study else []
    folder = out / f"teacher-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
    if not (folder / "task.toml").is_file():
        teacher = make_teacher(context, backbone, task, settings.max_new_tokens)
        asked = list(rows)
        if self_study:
            callback.on_stage(f"writing {self_study} queries about the context")
            texts = write_queries(teacher.model, context, self_study, experiment.seed, chat=bool(messages))
            asked += [{task.inputs[0]: [{"role": "user", "content": text}] if messages else text} for text in texts]
        callback.on_stage(f"answering {len(asked)} queries with the context")
        answers = _answers(teacher, context, task, asked, settings)
        answered = [_answered(task, row, text) for row, text in zip(asked, answers, strict=True) if text]
        if not answered:
            remedy = (
                "use a backbone that is trained to chat"
                if messages
                else "end the template so that an answer follows, as in 'Question: {question}\\nAnswer:'"
            )
            source = "" if queries is None else f" of {path}"
            raise ValueError(f"the model wrote nothing for any of the {len(asked)} queries{source}; {remedy}")
        _write_task(folder, task, answered)
    count = len(read_rows(folder / "answers.jsonl", [messages or task.target], as_json=messages))
    if count < len(rows) and not self_study:
        callback.on_note(f"the model wrote nothing for {len(rows) - count} of {len(rows)} queries, which are left out")
    elif count < len(rows) + self_study:
        callback.on_note(
            f"there are {count} of {len(rows) + self_study} queries: the others are the same as one of these, or the "
            "model wrote nothing for them"
        )
    located = experiment.replace(task=str(folder / "task.toml"), data=None)
    return train(located, out=out, name=name, backbone=backbone, callback=callback)


def _read_queries(path: Path, task: Task) -> list[dict[str, Any]]:
    """The checked queries."""
    purpose = " for the messages" if task.messages else " for the template"
    rows = [dict(row) for row in read_rows(path, task.inputs, purpose=purpose, as_json=task.messages)]
    for number, row in enumerate(rows, start=1):
        task.render(row, f"row {number} of {path}")
    return rows


def _task(path: Path, template: str, messages: str) -> Task:
    name, metrics = path.name.partition(".")[0], ("token_f1", "exact_match")
    if messages:  # only the last answer will be the teacher's
        return Task(name=name, messages=messages, assistant_turns="last", metrics=metrics)
    columns = {column for is_column, column in parse(template) if is_column}
    target = "answer"
    while target in columns:  # the template has a column of that name
        target = f"teacher_{target}"
    return Task(name=name, template=template, target=target, metrics=metrics)


def _answered(task: Task, row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The query with the teacher's answer."""
    if not task.messages:
        return {**row, task.target: answer}
    return {task.messages: [*without_answer(task.conversation(row)), {"role": "assistant", "content": answer}]}


def _answers(
    teacher: Teacher,
    context: str,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    settings: TrainingConfig,
) -> list[str]:
    """The teacher's greedy answer to each row, in their order.

    Raises:
        ValueError: a row that does not fit after the context: it is never shortened more than for the training.
    """
    model, max_new_tokens = teacher.model, settings.max_new_tokens
    limit = settings.max_input_tokens or 512  # as the prompt will be trained on them
    examples = encode(task, teacher.backbone.tokenizer, rows, limit, appends_eos=model.appends_eos, answers=False)[0]
    check_after_context(teacher, context, task, rows, examples, "queries", max_new_tokens)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    texts = [""] * len(examples)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        answers = answers_of(teacher, model, task, [examples[row] for row in batch], max_new_tokens)
        for row, answer in zip(batch, answers, strict=True):
            texts[row] = answer.text
    return texts


def _write_task(folder: Path, task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """A task of the answered queries; the file that makes it complete is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    lines: dict[str, Any] = {"name": task.name, "train": "answers.jsonl"}
    for key in ("messages", "assistant_turns") if task.messages else ("template", "target"):
        lines[key] = getattr(task, key)
    lines["metrics"] = list(task.metrics)
    # A JSON string or list of strings is a TOML one too, but for the halves of escaped emojis and a bare DEL.
    texts = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in lines.items()}
    files.write_text(folder / "task.toml", "".join(f"{key} = {text}\n" for key, text in texts.items()))
