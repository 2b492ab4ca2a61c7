"""What is learned: a task is a frozen value that makes text, or an image, and an answer of a table's row."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from softprompt.backbones import image_processor
from softprompt.files import check_name
from softprompt.tasks.metrics import METRICS
from softprompt.tasks.template import format_hint, label_texts, parse, value_text

TASKS: dict[str, "Task"] = {}
"""The built-in tasks by name. Filled by `register`."""

Reader = Callable[["Task", Path | None], Mapping[str, Any]]
"""Reads a source: `datasets.Dataset`s named `rows` (to be cut), `train`, `validation` (to be halved), `dev`, `test`.

The path is a folder to read in the source's own place; a reader that knows none calls `refuse_folder`.
"""

READERS: dict[str, Reader] = {}
"""What reads a task's `source`. Filled by `register` and by the reader of the user's own files."""


@final
@dataclass(frozen=True, kw_only=True)
class Template:
    """Another wording of a task: its text, and its words or its target where they differ from the task's own."""

    text: str
    label_words: Mapping[str, str] = field(default_factory=dict, hash=False)
    target: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    r"""A template, what is answered, and how the answers are scored.

    A task with `label` and `label_words` is a classification, one with `target` a generation; one with `image` in place
    of a template classifies images. It says all that training, evaluation and prediction need, so a run's folder
    keeps it as JSON and needs no other file.

    Raises:
        ValueError: a template, word or metric that cannot work, by name.

    >>> task = Task(name="x", template="Review: {text}\nSentiment:", label="y", label_words={"0": "bad", "1": "good"})
    >>> task.render({"text": "fine"}), task.answers, task.answer({"y": 1})
    ('Review: fine\nSentiment:', (' bad', ' good'), 1)
    """

    name: str
    description: str = ""
    """One line for a list."""
    template: str = ""
    """The input's text with `{column}` fields; `{{` and `}}` are braces. Empty where the input is an image."""
    image: str = ""
    """The column that holds the image (a path, or its bytes as `datasets` has them), in a task of images."""
    broken: Literal["refuse", "skip"] = "refuse"
    """What happens to a row whose image cannot be read: an error, or the row is left out and named."""
    label: str = ""
    """The column that holds the label, in a classification."""
    label_words: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What is answered for each label, in the order of the classes; a boolean label is `false` or `true` here, and a
    number is its text, where 1 and 1.0 are the same."""
    target: str = ""
    """The column that holds the answer (or a list of accepted answers), in a generation."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names in `METRICS`; the first selects the checkpoint."""
    group: str = ""
    """Rows with equal values in this column stay in one split."""
    question: str = ""
    """Rows with equal values in this column are one question to a metric that scores whole questions."""
    max_input_tokens: int | None = None
    """How many tokens an input of this task wants at most; none: no advice."""
    templates: Mapping[str, Template] = field(default_factory=dict, hash=False)
    """Other wordings by name, for `using`."""
    source: str = "files"
    """Who reads the rows: a name in `READERS`."""
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The user's own files by split, with the source `files`."""
    split_seed: int | None = None
    """Fixes the splits for every experiment; none: they follow the experiment's seed."""

    def __post_init__(self) -> None:
        for name in ("label_words", "templates", "files"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        check_name(self.name, "a task's name")  # runs' folders, reports' files and a service's lists have it
        if self.image:
            self._check_image()
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
            raise ValueError(f"task {self.name!r} has images and {have}; give a label, and words for it, alone")
        if self.broken not in ("refuse", "skip"):
            raise ValueError(f"broken of task {self.name!r} is {self.broken!r}; it must be 'refuse' or 'skip'")

    def _check_answers(self) -> None:
        if bool(self.label) == bool(self.target):
            have = "both" if self.label else "neither"
            raise ValueError(f"task {self.name!r} has {have} of label and target; give the one column it answers with")
        if self.target and self.label_words:
            raise ValueError(f"task {self.name!r} has words and the target {self.target!r}; words go with a label")
        if self.label and len(self.label_words) < 2:
            raise ValueError(
                f"task {self.name!r} has only the labels {list(self.label_words)}; a classification needs two or more"
            )
        seen: dict[str, str] = {}
        for label, word in self.label_words.items():
            if not word or word != word.strip():
                raise ValueError(
                    f"label {label!r} of task {self.name!r} has the word {word!r}; give it one, without space around"
                )
            if (other := seen.setdefault(_bare(word), label)) != label:
                raise ValueError(
                    f"labels {other!r} and {label!r} of task {self.name!r} have the same word {word!r}; "
                    "give each label a word of its own"
                )

    def _check_metrics(self) -> None:
        if not self.metrics:
            raise ValueError(f"task {self.name!r} has no metrics; known are {', '.join(sorted(METRICS))}")
        first = METRICS.get(self.metrics[0])
        if first is not None and first.falls:
            raise ValueError(
                f"the first metric of task {self.name!r} selects the checkpoint and has to be higher where it is "
                f"better, which {self.metrics[0]!r} is not; put another one in front of it, pearson or spearman"
            )
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r} of task {self.name!r}; {suggest(name, METRICS)}")
            metric = METRICS[name]
            if (metric.of == "labels") != self.is_classification:
                fitting = [known for known in sorted(METRICS) if METRICS[known].of != metric.of]
                raise ValueError(
                    f"metric {name!r} scores {metric.of}, but task {self.name!r} answers with "
                    f"{'labels' if self.is_classification else 'text'}; use one of {', '.join(fitting)}"
                )
            if metric.binary and len(self.label_words) != 2:
                raise ValueError(
                    f"metric {name!r} needs two labels, but task {self.name!r} has {len(self.label_words)}; "
                    "use macro_f1"
                )
            if metric.grouped and not self.question:
                raise ValueError(
                    f"metric {name!r} scores whole questions; name the column of task {self.name!r} that tells "
                    "them apart as `question`"
                )

    @property
    def is_classification(self) -> bool:
        """Whether it answers with one of `label_words`."""
        return bool(self.label)

    @property
    def lead(self) -> str:
        """What stands between the template and an answer: a space, unless the template ends in white space."""
        return "" if self.template[-1:].isspace() else " "

    @property
    def answers(self) -> tuple[str, ...]:
        """The words as the model would write them, in the order of the classes; empty for a generation."""
        return tuple(self.lead + word for word in self.label_words.values())

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that the model's input is made of, sorted."""
        return tuple(sorted({text for is_field, text in parse(self.template) if is_field} | {self.image} - {""}))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the task reads, sorted."""
        return tuple(sorted({*self.inputs, self.label, self.target, self.group, self.question} - {""}))

    def pieces(self, row: Mapping[str, Any], where: str = "the row") -> list[tuple[bool, str]]:
        """The rendered template in order, each part with whether it comes from the row; of an image its name.

        Raises:
            ValueError: a column that `row` lacks or has no text in; `where` names the row in the message.
        """
        if self.image:
            return [(True, image_processor.name(self._value(row, self.image, where)))]
        return [
            (is_field, value_text(self._value(row, text, where), text, where) if is_field else text)
            for is_field, text in parse(self.template)
        ]

    def render(self, row: Mapping[str, Any], where: str = "the row") -> str:
        """The input's text; raises as `pieces` does."""
        return "".join(text for _, text in self.pieces(row, where))

    def answer(self, row: Mapping[str, Any], where: str = "the row") -> int | str:
        """The class's index, or the (first accepted) text.

        Raises:
            ValueError: a missing answer, or a label without a word, naming the row and the column.
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
        value = self._value(row, self.target, where)
        several = value if isinstance(value, list) else [value]
        texts = tuple(value_text(text, self.target, where) for text in several)
        if not texts or not all(text.strip() for text in texts):
            raise ValueError(f"{where} has no answer in column {self.target!r}; give it one or leave the row out")
        return texts

    def classify(self, text: str) -> int | None:
        """The class whose word `text` is, but for case and the space around it; none if it is no word."""
        return next((i for i, word in enumerate(self.label_words.values()) if _bare(word) == _bare(text)), None)

    def using(self, template: str) -> "Task":
        """The same task in another of its wordings.

        Raises:
            ValueError: it has no template of that name.
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
        """The task that wrote `values`.

        Raises:
            ValueError: an unknown setting, by name.
        """
        known = {part.name for part in dataclasses.fields(Task)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a task has no setting {unknown[0]!r}; {suggest(unknown[0], known)}")
        if missing := sorted({"name", "image" if values.get("image") else "template"} - set(values)):
            raise ValueError(f"a task without {missing[0]!r} cannot be read; give it one")
        templates = {name: Template(**other) for name, other in values.get("templates", {}).items()}
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
    """Put a built-in task into `TASKS` and its reader into `READERS`.

    Raises:
        ValueError: the name is taken.
    """
    if task.name in TASKS:
        raise ValueError(f"the task name {task.name!r} is taken; rename the new task")
    TASKS[task.name] = task
    READERS[task.source] = read
    return task


def refuse_folder(task: Task, folder: Path | None) -> None:
    """For a reader that reads no folder.

    Raises:
        ValueError: a folder is given.
    """
    if folder is not None:
        raise ValueError(
            f"{folder} is a folder, and the rows of task {task.name!r} are not read from one; give a file of rows"
        )


def suggest(word: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    """What to say after an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"


def _bare(word: str) -> str:
    return word.strip().casefold()
