"""`Task`: turns a table's row into a model's input and its answer, and names the metrics."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from softprompt.files import check_name
from softprompt.tasks.conversation import Message, as_text, read_messages, split_answer, without_answer
from softprompt.tasks.metrics import METRICS
from softprompt.tasks.template import format_hint, label_texts, parse, value_text

TASKS: dict[str, "Task"] = {}
"""The built-in tasks by name, filled by `register`."""

Reader = Callable[["Task", Path | None], Mapping[str, Any]]
"""Reads a source: `datasets.Dataset`s named `rows` (to be split), `train`, `validation` (to be halved), `dev`, `test`.

The path is a folder to read instead of the source; a reader that cannot read one calls `check_no_folder`.
"""

READERS: dict[str, Reader] = {}
"""The reader of each `Task.source`: a built-in task's, filled by `register`, and those of the user's own data."""


@final
@dataclass(frozen=True, kw_only=True)
class Template:
    """Another wording of a task: its text, and its label words or target where they differ from the task's."""

    text: str
    """The template's text, with columns as {column}."""
    label_words: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The word of each label; empty: the task's."""
    target: str = ""
    """The column of the answer; empty: the task's."""


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    r"""A template, the answers, and the metrics that score them.

    A task with `label` and `label_words` is a classification, one with `target` a generation; one with `image` instead
    of a template classifies images, and one with `messages` continues conversations. A run stores it as JSON, which is
    all that evaluation and prediction need.

    Raises:
        ValueError: a template, label word or metric that cannot work, by name.

    >>> task = Task(name="x", template="Review: {text}\nSentiment:", label="y", label_words={"0": "bad", "1": "good"})
    >>> task.render({"text": "fine"}), task.answers, task.answer({"y": 1})
    ('Review: fine\nSentiment:', (' bad', ' good'), 1)
    """

    name: str
    description: str = ""
    """One line, for lists of tasks."""
    template: str = ""
    """The input text with `{column}` fields; `{{` and `}}` are braces. Empty if the input is an image or a chat."""
    messages: str = ""
    """The column of the conversation, in a chat task: messages in OpenAI's format, the last one the answer. The
    backbone's own chat template lays them out."""
    assistant_turns: Literal["all", "last"] = "all"
    """In a chat task: train on every assistant's message that answers one, or on the last one only."""
    image: str = ""
    """The column of the image (a path, or its bytes as `datasets` stores them), in an image task."""
    broken: Literal["refuse", "skip"] = "refuse"
    """How to treat a row whose image cannot be read: as an error, or leave it out and name it."""
    label: str = ""
    """The column of the label, in a classification."""
    label_words: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The text that the model answers for each label, in class order. Keys are texts: a boolean label is `false` or
    `true`, and a number is written out, where 1 and 1.0 are the same."""
    target: str = ""
    """The column of the answer (or of a list of accepted answers), in a generation."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names in `METRICS`; the first selects the checkpoint."""
    group: str = ""
    """Rows with equal values in this column stay in one split."""
    question: str = ""
    """Rows with equal values in this column are one question, for metrics that score questions; without a group they
    stay in one split too."""
    max_input_tokens: int | None = None
    """The suggested limit of input tokens; None: no suggestion."""
    templates: Mapping[str, Template] = field(default_factory=dict, hash=False)
    """Other wordings by name, for `using`."""
    source: str = "files"
    """What reads the rows: a name in `READERS`."""
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The user's files by split."""
    split_seed: int = 0
    """The seed of the splits. They do not follow the experiment's seed: all runs of a task have the same test rows."""

    def __post_init__(self) -> None:
        for name in ("label_words", "templates", "files"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        check_name(self.name, "a task's name")  # folders of runs and files of reports are named after it
        if self.image:
            self._check_image()
        elif self.messages:
            self._check_messages()
        elif not any(is_field for is_field, _ in parse(self.template)):
            raise ValueError(
                f"the template {self.template!r} of task {self.name!r} names no column; write one as {{column}}"
            )
        self._check_answers()
        self._check_metrics()
        if self.max_input_tokens is not None and self.max_input_tokens < 1:
            raise ValueError(
                f"max_input_tokens of task {self.name!r} is {self.max_input_tokens}; it must be at least 1"
            )

    def _check_image(self) -> None:
        if self.template or not self.label:
            have = f"the template {self.template!r}" if self.template else "no label"
            raise ValueError(f"an image task takes a label and label words only, but {self.name!r} has {have}")
        if self.broken not in ("refuse", "skip"):
            raise ValueError(f"broken of task {self.name!r} is {self.broken!r}; it must be 'refuse' or 'skip'")

    def _check_messages(self) -> None:
        for name in ("template", "label", "target", "label_words"):
            if value := getattr(self, name):
                raise ValueError(
                    f"task {self.name!r} has messages and the {name} {value!r}; a chat is laid out by the backbone's "
                    "chat template and answered by its last message, so leave one of them out"
                )
        if self.assistant_turns not in ("all", "last"):
            raise ValueError(
                f"assistant_turns of task {self.name!r} is {self.assistant_turns!r}; it must be 'all' or 'last'"
            )

    def _check_answers(self) -> None:
        if self.messages:
            return
        if bool(self.label) == bool(self.target):
            have = "both" if self.label else "neither"
            raise ValueError(f"task {self.name!r} has {have} of label and target; give the one column it answers with")
        answer = self.label or self.target
        if answer in [name for is_field, name in parse(self.template) if is_field]:
            raise ValueError(
                f"the template {self.template!r} of task {self.name!r} has the column {answer!r}, which is the "
                "answer; take it out"
            )
        if self.target and self.label_words:
            raise ValueError(
                f"task {self.name!r} has label words and the target {self.target!r}; label words go with `label`"
            )
        if self.label and len(self.label_words) < 2:
            raise ValueError(
                f"task {self.name!r} has only the labels {list(self.label_words)}; a classification needs two or more"
            )
        labels: dict[str, str] = {}
        for label, word in self.label_words.items():
            if not word or word != word.strip():
                raise ValueError(
                    f"label {label!r} of task {self.name!r} has the word {word!r}; "
                    "give it one without surrounding space"
                )
            if (other := labels.setdefault(_bare(word), label)) != label:
                raise ValueError(
                    f"labels {other!r} and {label!r} of task {self.name!r} have the same word {word!r}; "
                    "give each label a different word"
                )

    def _check_metrics(self) -> None:
        if not self.metrics:
            raise ValueError(f"task {self.name!r} has no metrics; known are {', '.join(sorted(METRICS))}")
        first = METRICS.get(self.metrics[0])
        if first is not None and first.lower_is_better:
            raise ValueError(
                f"the first metric of task {self.name!r} selects the checkpoint, but lower is better for "
                f"{self.metrics[0]!r}; list pearson or spearman before it"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r} of task {self.name!r}; {suggest(name, METRICS)}")
            metric = METRICS[name]
            if (metric.answer_kind == "labels") != self.is_classification:
                fitting = [
                    other
                    for other in sorted(METRICS)
                    if (METRICS[other].answer_kind == "labels") == self.is_classification
                ]
                raise ValueError(
                    f"metric {name!r} scores {metric.answer_kind}, but task {self.name!r} answers with "
                    f"{'labels' if self.is_classification else 'text'}; use one of {', '.join(fitting)}"
                )
            if metric.binary and len(self.label_words) != 2:
                raise ValueError(
                    f"metric {name!r} needs two labels, but task {self.name!r} has {len(self.label_words)}; "
                    "use macro_f1"
                )
            if metric.grouped and not self.question:
                raise ValueError(
                    f"metric {name!r} scores whole questions, but task {self.name!r} has no `question`; "
                    "name the column that identifies them"
                )

    @property
    def is_classification(self) -> bool:
        """Whether the answer is one of `label_words`."""
        return bool(self.label)

    @property
    def lead(self) -> str:
        """The text between the template and an answer: a space, unless the template ends in white space."""
        return "" if self.template[-1:].isspace() else " "

    @property
    def answers(self) -> tuple[str, ...]:
        """The label words as the model would write them, in class order; empty for a generation."""
        return tuple(self.lead + word for word in self.label_words.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns of the model's input, sorted."""
        return tuple(
            sorted({text for is_field, text in parse(self.template) if is_field} | {self.image, self.messages} - {""})
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the task reads, sorted."""
        return tuple(sorted({*self.inputs, self.label, self.target, self.group, self.question} - {""}))

    @property
    def split_unit(self) -> str:
        """The column whose rows with equal values stay in one split; empty if each row is split by itself."""
        return self.group or self.question

    def pieces(self, row: Mapping[str, Any], where: str = "the row") -> list[tuple[bool, str]]:
        """The rendered template as `(comes from the row, text)` pairs in order; of an image, its name.

        Of a chat it is the conversation to answer, as text for a reader.

        Raises:
            ValueError: `row` lacks a column, or has no text in it; `where` names the row in the message.
        """
        if self.image:
            from softprompt.backbones import image_processor  # not earlier: it imports torch

            return [(True, image_processor.name(self._value(row, self.image, where)))]
        if self.messages:
            return [(True, as_text(without_answer(self.conversation(row, where))))]
        return [
            (is_field, value_text(self._value(row, text, where), text, where) if is_field else text)
            for is_field, text in parse(self.template)
        ]

    def check_input(self, row: Mapping[str, Any], where: str = "the row") -> None:
        """Check that some column of the input has text.

        Raises:
            ValueError: none has, or as `pieces`; `where` names the row in the message.
        """
        if not any(text.strip() for is_field, text in self.pieces(row, where) if is_field):
            raise ValueError(f"{where} has no text in any column of the template; give it some or leave the row out")

    def render(self, row: Mapping[str, Any], where: str = "the row") -> str:
        """The input text; raises as `pieces` does."""
        return "".join(text for _, text in self.pieces(row, where))

    def conversation(self, row: Mapping[str, Any], where: str = "the row") -> list[Message]:
        """The checked messages, in a chat task; raises as `read_messages`, or if `row` lacks the column."""
        return read_messages(self._value(row, self.messages, where), self.messages, where)

    def answer(self, row: Mapping[str, Any], where: str = "the row") -> int | str:
        """The class index, or the (first accepted) text.

        Raises:
            ValueError: a missing answer, or a label without a label word, naming the row and the column.
        """
        if not self.is_classification:
            return self.golds(row, where)[0]
        texts = label_texts(self._value(row, self.label, where), self.label, where)
        label = next((text for text in texts if text in self.label_words), texts[0])
        if not label.strip():
            raise ValueError(f"{where} has no label in column {self.label!r}; give it one or leave the row out")
        if label not in self.label_words:
            raise ValueError(
                f"{where} has the label {label!r} in column {self.label!r}, which has no word; "
                f"there are words for {', '.join(self.label_words)}"
            )
        return list(self.label_words).index(label)

    def golds(self, row: Mapping[str, Any], where: str = "the row") -> tuple[str, ...]:
        """Every accepted answer, as a generation is scored against; raises as `answer` does."""
        if self.is_classification:
            return (list(self.label_words.values())[int(self.answer(row, where))],)
        if self.messages:
            return (split_answer(self.conversation(row, where), self.messages, where)[1],)
        value = self._value(row, self.target, where)
        several = value if isinstance(value, list) else [value]
        texts = tuple(value_text(text, self.target, where) for text in several)
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"{where} has no answer in column {self.target!r}; give it one or leave the row out")
        return texts

    def classify(self, text: str) -> int | None:
        """The class whose label word `text` is, ignoring case and surrounding space; None if there is none."""
        return next((i for i, word in enumerate(self.label_words.values()) if _bare(word) == _bare(text)), None)

    def using(self, template: str) -> "Task":
        """The same task in the wording `template`.

        Raises:
            ValueError: the task has no template of that name.
        """
        if template not in self.templates:
            raise ValueError(f"task {self.name!r} has no template {template!r}; {suggest(template, self.templates)}")
        other = self.templates[template]
        label_words, target = other.label_words or self.label_words, other.target or self.target
        return dataclasses.replace(self, template=other.text, label_words=label_words, target=target)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is its inverse."""
        return {**dataclasses.asdict(self), "metrics": list(self.metrics)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Task":
        """The task that `to_json` wrote as `values`.

        Raises:
            ValueError: an unknown or missing setting, by name.
        """
        known = {field.name for field in dataclasses.fields(Task)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a task has no setting {unknown[0]!r}; {suggest(unknown[0], known)}")
        layout = next((name for name in ("image", "messages") if values.get(name)), "template")
        if missing := sorted({"name", layout} - set(values)):
            raise ValueError(f"a task without {missing[0]!r} cannot be read; give it one")
        templates = {name: Template(**template) for name, template in values.get("templates", {}).items()}
        metrics = tuple(values.get("metrics", ("accuracy",)))
        return Task(**{**values, "templates": templates, "metrics": metrics})

    def _value(self, row: Mapping[str, Any], column: str, where: str) -> Any:
        if column not in row:
            raise ValueError(
                f"{where} has no column {column!r}, which task {self.name!r} reads; it has {', '.join(map(str, row))}"
                + format_hint(column, list(row))
            )
        return row[column]


def register(task: Task, read: Reader) -> Task:
    """Add a built-in task to `TASKS` and its reader to `READERS`.

    Raises:
        ValueError: the name is taken.
    """
    if task.name in TASKS:
        raise ValueError(f"the task name {task.name!r} is taken; rename the new task")
    TASKS[task.name] = task
    READERS[task.source] = read
    return task


def check_no_folder(task: Task, folder: Path | None) -> None:
    """Refuse a folder on behalf of a reader that cannot read one.

    Raises:
        ValueError: `folder` is not None.
    """
    if folder is not None:
        raise ValueError(f"{folder} is a folder, but task {task.name!r} reads its rows from files; give a file of rows")


def suggest(word: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    """The hint after an unknown name in an error: the most similar known name, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"


def _bare(word: str) -> str:
    return word.strip().casefold()
