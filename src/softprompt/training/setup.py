"""The beginning of a training run: rows, backbone and prompt, checked before the run's folder is created."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, final

from datasets import Dataset

from softprompt import runs
from softprompt.assets.hub import local_folder
from softprompt.backbones import Backbone, load, resolve_dtype
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import predictions_and_golds, read_splits, sample_examples
from softprompt.evaluation.predict import input_limit, over_long_note
from softprompt.models import PromptedModel, attach, verify
from softprompt.models.peft_folder import read_peft_folder
from softprompt.models.teacher import Teacher
from softprompt.runs import Gradient, Run
from softprompt.tasks import Task, read_answers
from softprompt.tasks.data.chat import with_answered_turns
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.images import sample_pixels, with_augmentation
from softprompt.tasks.data.splits import Splits
from softprompt.tasks.data.tokenize import answer_ids, check_input_kind, encode
from softprompt.tasks.user import load_task
from softprompt.training import checkpoint
from softprompt.training.callbacks import TrainingCallback
from softprompt.training.checks import check_settings_apply, check_shardable, check_trainable
from softprompt.training.context import check_after_context, make_teacher, read_context, teacher_of
from softprompt.training.distributed import DistributedGroup
from softprompt.training.gradients import gradient_on
from softprompt.training.start_notes import inexact_start_note, init_prompt_note
from softprompt.types import Dtype


@final
@dataclass(frozen=True)
class TrainingSetup:
    """What a training run works on."""

    task: Task
    rows: Splits
    backbone: Backbone
    """As it was loaded; a baseline trains a copy of it, which is `prompted.backbone`."""
    prompted: PromptedModel
    """The model to train; before the first step, its initialization."""
    train: Sequence[Example]
    """The training rows as tokens or images, augmented as the experiment says."""
    dev: Sequence[Example]
    """The development rows that are scored during training."""
    test: Sequence[Example]
    """The test rows that are scored at the end."""
    teacher: Teacher | None = None
    """The teacher of a distillation."""
    context: str = ""
    """The text that the teacher reads before each row."""


def new_run(experiment: Experiment, backbone: Backbone | None, callback: TrainingCallback) -> TrainingSetup:
    """The setup of a new run.

    Args:
        backbone: the experiment's backbone, if it is already loaded.

    Raises:
        ValueError: settings, rows and backbone do not fit together.
    """
    callback.on_stage("reading rows")
    task = load_task(experiment.task, experiment.data)
    if experiment.init_prompt is not None:
        runs.prompt_kind(local_folder(experiment.init_prompt))  # refuses a wrong folder before anything is loaded
    rows = read_splits(experiment, task)
    for warning in rows.warnings:
        callback.on_note(warning)
    callback.on_stage(f"loading {experiment.backbone}")
    backbone = backbone or _load_backbone(experiment, experiment.backbone_dtype)
    backbone = with_sample_images(backbone, experiment, task, rows)
    check_settings_apply(experiment, task, backbone)
    if experiment.prompt_position == "after_bos" and not _begins_with_special_token(backbone.tokenizer):
        callback.on_note(
            f"the tokenizer of {backbone.source} does not begin texts with a special token, so the prompt comes after "
            "the text's own first token (--prompt-position after_bos)"
        )
    context = read_context(experiment, rows.demonstrations)
    teacher = make_teacher(context, backbone, task, experiment.training.max_new_tokens) if context else None
    gradient = _start_gradient(experiment, task, backbone, rows.train, teacher)
    prompted = runs.build_prompted_model(experiment, task, backbone, initialize=True, gradient=gradient)
    check_trainable(experiment, prompted)
    if experiment.init_prompt is not None and prompted.prompt is not None:
        folder = local_folder(experiment.init_prompt)
        source = runs.read_prompt(folder, backbone)
        callback.on_note(init_prompt_note(experiment.init_prompt, prompted.prompt, source))
        if runs.prompt_kind(folder) == "peft" and (note := read_peft_folder(folder).base_note(backbone)):
            callback.on_note(note)
    elif note := inexact_start_note(prompted.prompt):
        callback.on_note(note)
    return _encode_rows(experiment, task, rows, backbone, prompted, callback, teacher, context)


def resume_run(run: Run, backbone: Backbone | str | Path | None, callback: TrainingCallback) -> TrainingSetup:
    """The setup of an unfinished run.

    Args:
        backbone: the run's backbone, if it is already loaded, or where its weights are now.

    Raises:
        FileNotFoundError: the backbone is neither where the run recorded it nor at `backbone`.
        ValueError: the rows or the backbone's weights have changed since the run was started.
    """
    callback.on_stage("reading rows")
    experiment = run.experiment
    rows = read_splits(experiment, run.task)
    if rows.fingerprint != run.record["data"]["splits"]:
        raise ValueError(
            f"the rows of task {run.task.name} are not those {run.folder} was started with; start a new run"
        )
    if not isinstance(backbone, Backbone):
        source = experiment.backbone if backbone is None else str(backbone)
        callback.on_stage(f"loading {source}")
        try:
            backbone = _load_backbone(experiment.replace(backbone=source), run.record["backbone"]["dtype"])
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the backbone of run {run.folder} cannot be loaded from {source} ({error}); give its current path "
                "with --backbone"
            ) from error
    if backbone.hash != run.record["backbone"]["hash"]:
        raise ValueError(
            f"the weights of {backbone.source} are not those that {run.folder} was started with; start a new run"
        )
    is_new = not checkpoint.steps(run.folder)
    if is_new:
        runs.check_init_prompt(run)
    backbone = with_sample_images(backbone, experiment, run.task, rows)
    context = run.context
    teacher = teacher_of(run, backbone)
    gradient = _start_gradient(experiment, run.task, backbone, rows.train, teacher)
    prompted = runs.build_prompted_model(experiment, run.task, backbone, initialize=is_new, gradient=gradient)
    if experiment.training.shard:
        check_shardable(experiment, prompted)
    return _encode_rows(experiment, run.task, rows, backbone, prompted, callback, teacher, context)


def _start_gradient(
    experiment: Experiment, task: Task, backbone: Backbone, rows: Dataset, teacher: Teacher | None
) -> Gradient:
    """The gradient for a prompt that starts from it; it raises where the layers will be sharded."""

    def refuse(*_: Any) -> NoReturn:
        raise ValueError(
            "the prompt is to start from the gradient and shard is on, but layers are sharded only after the prompt is "
            "made; choose another initialization, or leave shard off"
        )

    return refuse if experiment.training.shard else gradient_on(experiment, task, backbone, rows, teacher)


def shard_backbone(setup: TrainingSetup, processes: DistributedGroup, callback: TrainingCallback) -> TrainingSetup:
    """Shard the backbone's layers over the processes for good, and verify the prompted model as it now runs."""
    if processes.world_size == 1:
        callback.on_note(
            "one process holds the whole backbone (--shard); start several: torchrun --nproc-per-node 2 ..."
        )
    backbone, prompted = setup.backbone, setup.prompted
    processes.check_equal("the layer implementations", prompted.supports_gradient_checkpointing)
    processes.shard(backbone.model)
    prompted.to(backbone.device)
    verify.forget(backbone.model)
    with processes.forward_scope():
        prompted = attach(
            backbone,
            prompted.prompt,
            head=prompted.head,
            prompt_position=prompted.prompt_position,
            prompt_attention=prompted.prompt_attention,
        )
    return replace(setup, prompted=prompted)


def _encode_rows(
    experiment: Experiment,
    task: Task,
    rows: Splits,
    backbone: Backbone,
    prompted: PromptedModel,
    callback: TrainingCallback,
    teacher: Teacher | None,
    context: str,
) -> TrainingSetup:
    """Tokenize every row that will be used, and check that it fits, also after the context of a distillation.

    Raises:
        ValueError: a row does not fit the model, by its number and split.
    """
    settings = experiment.training
    callback.on_stage("tokenizing")
    limit = input_limit(prompted, task, settings)
    if task.is_classification:
        prompted.check_candidates(task.answers, answer_ids(task, backbone.tokenizer))

    def encode_split(split: str, count: int, seed: int) -> Sequence[Example]:
        table = getattr(rows, split)
        if split == "train":
            table = with_answered_turns(task, table)
        examples, shortened = encode(task, backbone.tokenizer, table, limit, appends_eos=prompted.appends_eos)
        if shortened:
            callback.on_note(
                f"{shortened} of {len(examples)} {split} rows were cut to {limit} tokens (--max-input-tokens)"
            )
        if isinstance(examples, Examples) and examples.answers_ended:
            callback.on_note(
                f"{examples.answers_ended} of {len(examples)} {split} answers end with the tokenizer's own "
                f"{backbone.tokenizer.eos_token}, which is removed: every answer gets one anyway"
            )
        sampled = sample_examples(task, table, examples, count, seed)
        # A generated answer is an input only in training; in the other splits it is only compared.
        answer_is_input = split == "train" or task.is_classification
        for example in sampled:
            if example.picture is None:
                where = f"{example.where} ({split} split)"
                prompted.check_row(example.input_ids, example.answer_ids if answer_is_input else (), where)
        if task.messages:
            _check_ends(prompted, sampled)
        if teacher is not None:
            check_after_context(teacher, context, task, table, sampled, f"{split} split", settings.max_new_tokens)
        if split != "train":
            _check_scorable(task, table, sampled, backbone.tokenizer)
        return sampled

    train = encode_split("train", 0, 0)
    dev = encode_split("dev", 0 if rows.shared else settings.dev_rows, experiment.seed)
    test = encode_split("test", settings.test_rows, 0)
    if note := over_long_note([*dev, *test], settings.max_new_tokens, "development and test"):
        callback.on_note(note)
    augmented = with_augmentation(train, settings.augment)
    return TrainingSetup(task, rows, backbone, prompted, augmented, dev, test, teacher, context)


def _check_ends(prompted: PromptedModel, examples: Sequence[Example]) -> None:
    """Check that the chat template ends the assistant's messages with a token that ends what the model writes."""
    ends, tokenizer = prompted.end_of_sequence(), prompted.backbone.tokenizer
    for example in examples:
        if example.answer_ids[-1] not in ends:
            token = tokenizer.convert_ids_to_tokens(example.answer_ids[-1])
            raise ValueError(
                f"the chat template of {prompted.backbone.source} ends the answer of {example.where} with {token!r}, "
                f"and the model's answers end with {', '.join(map(repr, tokenizer.convert_ids_to_tokens(ends)))}; name "
                "the template's token as eos_token in the backbone's tokenizer or generation config"
            )


def _check_scorable(task: Task, table: Any, examples: Sequence[Example], tokenizer: Any) -> None:
    """Check that every metric of the task can read the gold answers: a numeric metric needs numbers."""
    _, golds, questions = predictions_and_golds(task, table, examples, [], tokenizer)
    for metric in task.metrics:
        read_answers(task, metric, [None] * len(golds), golds, questions)


def _load_backbone(experiment: Experiment, dtype: Dtype) -> Backbone:
    """Load the experiment's backbone; if it will be sharded, on the CPU, since one GPU may be too small for it."""
    if not experiment.training.shard:
        return load(experiment.backbone, dtype=dtype)
    return load(experiment.backbone, dtype=resolve_dtype(dtype), device="cpu")


def with_sample_images(backbone: Backbone, experiment: Experiment, task: Task, rows: Splits) -> Backbone:
    """For an image task, `backbone` with training images from which to sample initial prompt vectors."""
    check_input_kind(task, backbone.tokenizer)
    if not task.image:
        return backbone
    size = experiment.training.image_size or backbone.tokenizer.size
    return backbone.with_sample_images(sample_pixels(task, backbone.tokenizer, rows.train, size, experiment.seed))


def _begins_with_special_token(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] in tokenizer.all_special_ids
