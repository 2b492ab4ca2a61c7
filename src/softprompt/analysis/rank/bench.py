"""Rows on which one prompt after another is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from softprompt import files
from softprompt.analysis.rank.subject import LoadedPrompt
from softprompt.backbones import load
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import (
    predictions_and_golds,
    read_splits,
    run_splits,
    sample_examples,
    score_examples,
)
from softprompt.evaluation.predict import input_limit
from softprompt.models import PromptedModel, attach
from softprompt.prompts import Folded
from softprompt.tasks import Answers, Example, Score, Splits, Task, encode, load_task, load_test_split, read_answers

Part = Literal["prompt", "update"]
"""What is cut: the prompt itself, or what it learned, added to its first values."""


@final
@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How a functional rank is measured."""

    part: Part = "prompt"
    """Cut the prompt, or what it learned (update): then rank 0 is the prompt before the first step."""
    ranks: tuple[int, ...] = ()
    """Ranks to try; none: each up to 8, then four for each doubling, up to the rank that the matrix has."""
    split: Literal["train", "dev", "test"] | None = None
    """Rows to score; none: dev, which leaves the test unseen (its full score is a little flattered, having chosen the
    prompt). Not with a file as data, which is scored whole."""
    rows: int = 500
    """So many of them, drawn by the run's seed; 0: all."""
    task: str | None = None
    """A task's name or TOML file, for a PEFT folder; a run has its own."""
    data: str | None = None
    """A file whose rows are scored, or a benchmark's official folder; none: where the run or the task has its rows."""
    backbone: str | None = None
    """Hub id, folder, .gguf file or asset; none: where the run had it, or what a PEFT folder's config names."""

    def __post_init__(self) -> None:
        if self.split not in (None, "train", "dev", "test"):
            raise ValueError(f"split is {self.split!r}; it must be train, dev or test")
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows}; it must be 0 (all) or more")


@final
@dataclass(frozen=True, kw_only=True)
class RankScorer:
    """Rows ready to be scored with any prompt."""

    prompted: PromptedModel
    task: Task
    splits: Splits
    split: str
    rows_of: str
    """What these rows are called in reports: their split, or `given` where they are a file's."""
    examples: Sequence[Example]
    max_new_tokens: int

    @classmethod
    def of(cls, subject: LoadedPrompt, cutting: Truncation) -> "RankScorer":
        """Read, draw and tokenise the rows; raises as `functional_rank` does."""
        experiment = _experiment(subject, cutting)
        whole = load_task(experiment.task) if subject.run is None else subject.run.task
        splits = None if cutting.data is None else load_test_split(whole, cutting.data, cutting.split)
        split, rows_of = (cutting.split or "dev",) * 2 if splits is None else ("test", "given")
        if splits is None:
            run = subject.run if cutting.data is None else None
            splits = read_splits(experiment, whole) if run is None else run_splits(run)
        table = getattr(splits, split)
        if not len(table):
            raise ValueError(f"task {whole.name!r} has no {split} rows; choose another split")
        own = subject.backbone or load(experiment.backbone, dtype=experiment.backbone_dtype)
        prompted = attach(own, subject.prompt) if subject.run is None else subject.run.prompted(own)
        limit = input_limit(prompted, whole, experiment.training)
        examples = encode(whole, own.tokenizer, table, limit, closing=prompted.appends_eos)[0]
        return cls(
            prompted=prompted,
            task=whole,
            splits=splits,
            split=split,
            rows_of=rows_of,
            examples=sample_examples(whole, table, examples, cutting.rows, experiment.seed),
            max_new_tokens=experiment.training.max_new_tokens,
        )

    def score(self, prompt: Folded) -> tuple[Score, Answers]:
        """The prompt's score, and its answers as the metric reads them."""
        own = self.prompted
        attached = attach(
            own.backbone,
            prompt.to(own.backbone.device),
            head=own.head,
            prompt_position=own.prompt_position,
            prompt_attention=own.prompt_attention,
        )
        rows, split, task = self.splits, self.split, self.task
        found, answers = score_examples(attached, task, rows, split, self.examples, self.max_new_tokens)
        given, golds, questions = predictions_and_golds(
            task, getattr(rows, split), self.examples, answers, own.backbone.tokenizer
        )
        return found, read_answers(task, found.metric, given, golds, questions)


def _experiment(subject: LoadedPrompt, cutting: Truncation) -> Experiment:
    """What says where rows come from and how long they may be."""
    if subject.run is not None:
        if cutting.task is not None:
            raise ValueError(f"{subject.folder} is a run and has its own task; leave --task out")
        own = subject.run.experiment
        return own if cutting.data is None else own.replace(data=cutting.data)
    if not subject.whole:
        raise ValueError(f"{subject.folder} holds more than a prompt's matrix, so a cut of that alone cannot be scored")
    if cutting.task is None:
        raise ValueError(f"{subject.folder} is no run and names no task; say which one scores it with --task")
    base = cutting.backbone
    if base is None:
        base = str(
            files.read_json(subject.folder / "adapter_config.json", "name the backbone with --backbone").get(
                "base_model_name_or_path"
            )
            or ""
        )
    return Experiment(task=cutting.task, data=cutting.data, backbone=base)
