"""Score a prompt and its truncations on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from softprompt.analysis.rank.loaded_prompt import LoadedPrompt
from softprompt.backbones import load
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import (
    predictions_and_golds,
    rows_to_score,
    sample_examples,
    score_examples,
)
from softprompt.evaluation.predict import encode_rows
from softprompt.models import PromptedModel, attach
from softprompt.prompts import Folded
from softprompt.tasks import Answers, Score, Task, read_answers
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.splits import Splits
from softprompt.tasks.user import load_task

Part = Literal["prompt", "update"]
"""The matrix that is truncated: the prompt `P`, or its update `P - P0` against the initial prompt."""


@final
@dataclass(frozen=True, kw_only=True)
class Truncation:
    """What is truncated to which ranks, and which rows score the result."""

    part: Part = "prompt"
    """Truncate the trained prompt P, or only its update P - P0 and add it back to the initial prompt P0."""
    ranks: tuple[int, ...] = ()
    """Ranks to try; empty: every rank up to 8, then four per doubling, up to the numerical rank of the matrix."""
    split: Literal["train", "dev", "test"] | None = None
    """Rows to score; None: dev, which keeps the test split unseen (dev selected the checkpoint, so the full score is
    slightly optimistic). Not with a file as data, all of whose rows are scored."""
    rows: int = 500
    """How many rows to score, sampled with the run's seed; 0: all."""
    task: str | None = None
    """A task's name or TOML file, for a PEFT folder; a run has its own."""
    data: str | None = None
    """A file of rows to score, or a benchmark's official folder; None: the rows of the run or the task."""
    backbone: str | None = None
    """Hub id, folder, .gguf file or asset; None: the backbone that the run or the PEFT folder names."""

    def __post_init__(self) -> None:
        if self.split not in (None, "train", "dev", "test"):
            raise ValueError(f"split is {self.split!r}; it must be train, dev or test")
        if self.rows < 0:
            raise ValueError(f"rows is {self.rows}; it must be 0 (all) or more")


@final
@dataclass(frozen=True, kw_only=True)
class RankScorer:
    """A model and tokenized rows, ready to score any prompt."""

    prompted: PromptedModel
    task: Task
    splits: Splits
    split: str
    rows_name: str
    """What reports call these rows: their split, or `file` for the rows of a file."""
    examples: Sequence[Example]
    max_new_tokens: int

    @classmethod
    def of(cls, loaded: LoadedPrompt, truncation: Truncation) -> "RankScorer":
        """Read, sample and tokenize the rows.

        Raises:
            ValueError: the prompt cannot be scored, or the split has no rows.
        """
        experiment = _experiment(loaded, truncation)
        task = load_task(experiment.task) if loaded.run is None else loaded.run.task
        splits, split = rows_to_score(task, loaded.run, truncation.data, truncation.split, default="dev")
        # Only a file has nothing but test rows.
        rows_name = split if truncation.data is None or len(splits.train) else "file"
        table = getattr(splits, split)
        backbone = loaded.backbone or load(experiment.backbone, dtype=experiment.backbone_dtype)
        if loaded.adapter is not None:
            loaded.adapter.prompt(backbone)  # raises if it is for another backbone
        prompted = attach(backbone, loaded.prompt) if loaded.run is None else loaded.run.prompted(backbone)
        examples = encode_rows(prompted, task, table, experiment.training)
        return cls(
            prompted=prompted,
            task=task,
            splits=splits,
            split=split,
            rows_name=rows_name,
            examples=sample_examples(task, table, examples, truncation.rows, experiment.seed),
            max_new_tokens=experiment.training.max_new_tokens,
        )

    def score(self, prompt: Folded) -> tuple[Score, Answers]:
        """The prompt's score, and its answers as the metric reads them."""
        backbone = self.prompted.backbone
        model = attach(
            backbone,
            prompt.to(backbone.device),
            head=self.prompted.head,
            prompt_position=self.prompted.prompt_position,
            prompt_attention=self.prompted.prompt_attention,
        )
        task, split, examples = self.task, self.split, self.examples
        score, answers = score_examples(model, task, self.splits, split, examples, self.max_new_tokens)
        table = getattr(self.splits, split)
        predictions, golds, questions = predictions_and_golds(task, table, examples, answers, backbone.tokenizer)
        return score, read_answers(task, score.metric, predictions, golds, questions)


def _experiment(loaded: LoadedPrompt, truncation: Truncation) -> Experiment:
    """The experiment that says where rows come from and how long they may be."""
    if loaded.run is not None:
        if truncation.task is not None:
            raise ValueError(f"{loaded.folder} is a run and has its own task; leave --task out")
        experiment = loaded.run.experiment
        return experiment if truncation.data is None else experiment.replace(data=truncation.data)
    if not loaded.complete:
        raise ValueError(
            f"{loaded.folder} holds more than a prompt's matrix, so a truncation of that alone cannot be scored"
        )
    if truncation.task is None:
        raise ValueError(f"{loaded.folder} is not a run and names no task; say which one scores it with --task")
    base = truncation.backbone
    if base is None:
        base = "" if loaded.adapter is None else loaded.adapter.base
        if not base:
            raise ValueError(f"{loaded.folder} names no base model; name the backbone with --backbone")
    return Experiment(task=truncation.task, data=truncation.data, backbone=base)
