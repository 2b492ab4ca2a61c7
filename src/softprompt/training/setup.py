"""The beginning of a training: its rows and its backbone, refused before there is a folder where they do not fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from softprompt import runs
from softprompt.backbones import Backbone, load, resolve_dtype
from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import beside_golds, draw, read_splits
from softprompt.evaluation.predict import input_limit, over_long_note
from softprompt.models import PromptedModel, fresh_head
from softprompt.models.vision import refuse_unfit
from softprompt.prompts import SoftPrompt
from softprompt.runs import Run
from softprompt.tasks import (
    Example,
    Examples,
    Splits,
    Task,
    answer_ids,
    augmented,
    encode,
    load_task,
    read_answers,
    refuse_other_input,
    sample,
)
from softprompt.training import checkpoint
from softprompt.training.callbacks import TrainingCallback
from softprompt.training.gradients import gradient_on
from softprompt.types import Dtype


@final
@dataclass(frozen=True)
class TrainingSetup:
    """What a training is made of."""

    task: Task
    rows: Splits
    backbone: Backbone
    prompted: PromptedModel
    """What will be trained, before its first step."""
    train: Sequence[Example]
    """The training rows as tokens, or with their images, as often augmented as the experiment says."""
    dev: Sequence[Example]
    """The development rows that are looked at in training."""
    test: Sequence[Example]
    """The test rows that are scored at the end."""


def new_run(experiment: Experiment, backbone: Backbone | None, watch: TrainingCallback) -> TrainingSetup:
    """The material of a new run.

    Args:
        backbone: the experiment's own, if it is loaded already.

    Raises:
        ValueError: settings, rows and backbone do not fit.
    """
    watch.stage("reading rows")
    task = load_task(experiment.task, experiment.data)
    rows = read_splits(experiment, task)
    for warning in rows.warnings:
        watch.note(warning)
    watch.stage(f"loading {experiment.backbone}")
    backbone = backbone or _loaded(experiment, experiment.backbone_dtype)
    backbone = with_sample_images(backbone, experiment, task, rows)
    _refuse_pointless(experiment, task, backbone)
    gradient = gradient_on(experiment, task, backbone, rows.train)
    prompted = runs.build_prompted_model(experiment, task, backbone, warm=True, gradient=gradient)
    _refuse_unfit(experiment, prompted)
    if experiment.init_prompt is not None and prompted.prompt is not None:
        start = runs.read_prompt(Path(experiment.init_prompt), backbone)
        watch.note(_start_note(experiment.init_prompt, prompted.prompt, start))
    return _encoded(experiment, task, rows, prompted, watch)


def resume_run(run: Run, given: Backbone | str | Path | None, watch: TrainingCallback) -> TrainingSetup:
    """The material of an unfinished run.

    Args:
        given: the run's backbone, if it is loaded already, or where its weights lie now.

    Raises:
        FileNotFoundError: the backbone is neither where the run recorded it nor at `given`.
        ValueError: the rows or the backbone's weights are not those it was started with.
    """
    watch.stage("reading rows")
    experiment = run.experiment
    rows = read_splits(experiment, run.task)
    if rows.fingerprint != run.record["data"]:
        raise ValueError(
            f"the rows of task {run.task.name} are not those {run.folder} was started with; start a new run"
        )
    if isinstance(given, Backbone):
        backbone = given
    else:
        source = experiment.backbone if given is None else str(given)
        watch.stage(f"loading {source}")
        try:
            backbone = _loaded(experiment.replace(backbone=source), run.record["backbone"]["dtype"])
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the backbone of run {run.folder} cannot be loaded from {source} ({error}); give the place where it "
                "lies now with --backbone"
            ) from error
    if backbone.hash != run.record["backbone"]["hash"]:
        raise ValueError(
            f"the weights of {backbone.source} are not those that {run.folder} was started with; start a new run"
        )
    backbone = with_sample_images(backbone, experiment, run.task, rows)
    gradient = gradient_on(experiment, run.task, backbone, rows.train)
    prompted = runs.build_prompted_model(
        experiment, run.task, backbone, warm=not checkpoint.steps(run.folder), gradient=gradient
    )
    if experiment.training.shard:
        _refuse_shards(experiment, prompted)
    return _encoded(experiment, run.task, rows, prompted, watch)


def _encoded(
    experiment: Experiment, task: Task, rows: Splits, prompted: PromptedModel, watch: TrainingCallback
) -> TrainingSetup:
    """The material with every row that will be used as tokens, each one checked: here, before there is a folder.

    Raises:
        ValueError: a row that does not fit the model, by its number and split.
    """
    settings, backbone = experiment.training, prompted.backbone
    watch.stage("tokenising")
    limit = input_limit(prompted, task, settings)
    if task.is_classification:
        prompted.check_candidates(task.answers, answer_ids(task, backbone.tokenizer))

    def encoded(split: str, count: int, seed: int) -> Sequence[Example]:
        table = getattr(rows, split)
        examples, shortened = encode(task, backbone.tokenizer, table, limit, closing=prompted.appends_eos)
        if shortened:
            watch.note(f"{shortened} of {len(examples)} {split} rows were cut to {limit} tokens (--max-input-tokens)")
        if isinstance(examples, Examples) and examples.answers_ended:
            watch.note(
                f"{examples.answers_ended} of {len(examples)} {split} answers end with the tokenizer's own "
                f"{backbone.tokenizer.eos_token}, which is left out: an answer is given its end anyway"
            )
        used = draw(task, table, examples, count, seed)
        # A text to be generated is fed to the model in training alone; elsewhere it is only compared with.
        fed = split == "train" or task.is_classification
        for example in used:
            if example.picture is None:
                where = f"{example.where} ({split} split)"
                prompted.check_row(example.input_ids, example.answer_ids if fed else (), where)
        if split != "train":
            _refuse_unscorable(task, table, used, backbone.tokenizer)
        return used

    train = encoded("train", 0, 0)
    dev = encoded("dev", 0 if rows.shared else settings.dev_rows, experiment.seed)
    test = encoded("test", settings.test_rows, 0)
    if note := over_long_note([*dev, *test], settings.max_new_tokens, "development and test"):
        watch.note(note)
    return TrainingSetup(task, rows, backbone, prompted, augmented(train, settings.augment), dev, test)


def _refuse_unscorable(task: Task, table: Any, examples: Sequence[Example], tokenizer: Any) -> None:
    """Refuse gold answers that a metric of the task cannot be computed with, such as a word where it needs a number."""
    _, golds, questions = beside_golds(task, table, examples, [], tokenizer)
    for metric in task.metrics:
        read_answers(task, metric, [None] * len(golds), golds, questions)


def _loaded(experiment: Experiment, dtype: Dtype) -> Backbone:
    """The experiment's backbone; where it will be sharded, on the CPU, since a GPU has no room for all of it."""
    if not experiment.training.shard:
        return load(experiment.backbone, dtype=dtype)
    return load(experiment.backbone, dtype=resolve_dtype(dtype), device="cpu")


def with_sample_images(backbone: Backbone, experiment: Experiment, task: Task, rows: Splits) -> Backbone:
    """`backbone` with training images to sample its input vectors from, where those are what it reads."""
    refuse_other_input(task, backbone.tokenizer)
    if not task.image:
        return backbone
    size = experiment.training.image_size or backbone.tokenizer.size
    return backbone.with_sample_images(sample(task, backbone.tokenizer, rows.train, size, experiment.seed))


def _refuse_pointless(experiment: Experiment, task: Task, backbone: Backbone) -> None:
    """Refuse settings that would change nothing, or of which nothing could come."""
    if backbone.architecture != "vision" and (idle := _given(experiment, _of_images)):
        raise ValueError(f"{idle} is for images, and {backbone.source} reads text; leave it out")
    if experiment.baseline != "none" and (idle := _given(experiment, _of_prompts)):
        raise ValueError(f"{idle} is for prompts, and the baseline {experiment.baseline} has none; leave it out")
    most = backbone.max_positions
    if most is not None and experiment.prompt.length >= most:
        raise ValueError(f"length is {experiment.prompt.length}, but {backbone.source} has {most} positions; lower it")
    head = fresh_head(backbone, len(task.label_words), torch.Generator())
    if experiment.training.zero_shot and head is not None:
        raise ValueError(
            f"{backbone.source} answers through a trained head, so it has no zero-shot answer; leave it out"
        )
    if experiment.training.vocabulary_weight and head is not None:
        raise ValueError(
            f"vocabulary_weight is {experiment.training.vocabulary_weight}, and {backbone.source} answers through a "
            "trained head, which gives no probability to words; leave it out"
        )
    if experiment.baseline == "head" and head is None:
        raise ValueError(f"{backbone.source} answers in words and has no head to train; use the baseline lora or full")


def _refuse_unfit(experiment: Experiment, prompted: PromptedModel) -> None:
    """Refuse what the attachment could not be trained with."""
    backbone = prompted.backbone
    if backbone.architecture == "vision" and prompted.prompt is not None:
        refuse_unfit(backbone, prompted.prompt)
    if (
        experiment.training.dropout
        and prompted.prompt_attention == "self"
        and not prompted.supports_self_attention_dropout
    ):
        raise ValueError(
            f"dropout is on, and isolated prompts of {backbone.source} ({backbone.architecture}) run without the "
            "model's own; leave dropout off, or prompt_attention=full"
        )
    if experiment.training.shard:
        _refuse_shards(experiment, prompted)
    if not experiment.training.gradient_checkpointing:
        return
    if not prompted.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing is on, and rows of {backbone.source} go on from a cache, which cannot be written "
            "to twice; leave it off, or give prompt_position=prefix and a model whose attention is not its own"
        )
    if not gradient_checkpointing.layers(backbone.model):
        raise ValueError(
            f"gradient_checkpointing is on, and {backbone.source} ({backbone.model.config.model_type}) has no layers "
            "that can be computed again; leave it off, or give --gradient-accumulation-steps"
        )


def _refuse_shards(experiment: Experiment, prompted: PromptedModel) -> None:
    """Refuse what cannot be shared out among processes."""
    backbone, why = prompted.backbone, ""
    if backbone.quantized:
        why = f"the weights are held as {backbone.quantized}"
    elif experiment.baseline != "none":
        why = f"the baseline {experiment.baseline} trains beside or in the layers"
    elif experiment.training.dropout and any(
        value for name, value in backbone.model.config.to_dict().items() if name.endswith("layerdrop")
    ):
        why = f"dropout makes each process leave out other layers of {backbone.source}"
    elif not gradient_checkpointing.layers(backbone.model):
        why = f"{backbone.source} ({backbone.model.config.model_type}) has no layers that can be told from the rest"
    elif not prompted.supports_fsdp:
        why = f"isolated prompts of {backbone.source} ({backbone.architecture}) go past its layers' own call"
    if why:
        raise ValueError(f"shard is on, and {why}; leave it off")


def _given(experiment: Experiment, settings: Callable[[Experiment], dict[str, Any]]) -> str | None:
    """The first of these settings that is not at its default."""
    default = settings(Experiment())
    return next((name for name, value in settings(experiment).items() if value != default[name]), None)


def _of_prompts(experiment: Experiment) -> dict[str, Any]:
    return {name: getattr(experiment, name) for name in ("depth", "prompt_position", "prompt_attention", "init_prompt")}


def _of_images(experiment: Experiment) -> dict[str, Any]:
    training = experiment.training
    return {
        "depth": experiment.depth,
        "pool": experiment.pool,
        "image_size": training.image_size,
        "augment": training.augment,
    }


def _start_note(source: str, first: SoftPrompt, start: SoftPrompt) -> str:
    """How much of a warm start the method can hold at all."""
    wanted = start.prompt().detach().cpu()
    error = float((first.prompt().detach().cpu() - wanted).norm() / wanted.norm())
    return f"starting from {source}, kept to a relative error of {error:.3g}"
