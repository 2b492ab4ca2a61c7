"""The beginning of a training run: rows, backbone and prompt, checked before the run's folder is created."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from softprompt import runs
from softprompt.assets.hub import local_folder
from softprompt.backbones import Backbone, load, resolve_dtype
from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import predictions_and_golds, read_splits, sample_examples
from softprompt.evaluation.predict import input_limit, over_long_note
from softprompt.models import PromptedModel, attach, fresh_head, verify
from softprompt.models.peft_folder import read_peft_folder
from softprompt.models.teacher import Teacher
from softprompt.runs import Run
from softprompt.tasks import Task, read_answers
from softprompt.tasks.data.chat import with_answered_turns
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.images import sample_pixels, with_augmentation
from softprompt.tasks.data.splits import Splits
from softprompt.tasks.data.tokenize import answer_ids, check_input_kind, encode
from softprompt.tasks.user import load_task
from softprompt.training import checkpoint
from softprompt.training.callbacks import TrainingCallback
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
    prompted: PromptedModel
    """The model to train; before the first step, its initialization."""
    train: Sequence[Example]
    """The training rows as tokens or images, augmented as the experiment says."""
    dev: Sequence[Example]
    """The development rows that are scored during training."""
    test: Sequence[Example]
    """The test rows that are scored at the end."""
    teacher: Teacher | None = None
    """Whose distribution the prompt is trained to give, in a distillation."""
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
    _check_settings_apply(experiment, task, backbone)
    context = read_context(experiment, rows.demonstrations)
    teacher = make_teacher(context, backbone, task) if context else None
    gradient = gradient_on(experiment, task, backbone, rows.train, teacher)
    prompted = runs.build_prompted_model(experiment, task, backbone, initialize=True, gradient=gradient)
    _check_trainable(experiment, prompted)
    if experiment.init_prompt is not None and prompted.prompt is not None:
        folder = local_folder(experiment.init_prompt)
        source = runs.read_prompt(folder, backbone)
        callback.on_note(init_prompt_note(experiment.init_prompt, prompted.prompt, source))
        if runs.prompt_kind(folder) == "peft" and (note := read_peft_folder(folder).base_note(backbone)):
            callback.on_note(note)
    elif note := inexact_start_note(prompted.prompt):
        callback.on_note(note)
    return _encode_rows(experiment, task, rows, prompted, callback, teacher, context)


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
    if rows.fingerprint != run.record["data"]:
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
    if is_new and runs.init_prompt_hash(experiment) != run.record["init_prompt"]:
        raise ValueError(
            f"the prompt {experiment.init_prompt} is not the one that {run.folder} was started from; start a new run"
        )
    backbone = with_sample_images(backbone, experiment, run.task, rows)
    context = run.context
    teacher = teacher_of(run, backbone)
    gradient = gradient_on(experiment, run.task, backbone, rows.train, teacher)
    prompted = runs.build_prompted_model(experiment, run.task, backbone, initialize=is_new, gradient=gradient)
    if experiment.training.shard:
        _check_shardable(experiment, prompted)
    return _encode_rows(experiment, run.task, rows, prompted, callback, teacher, context)


def shard_backbone(setup: TrainingSetup, processes: DistributedGroup, callback: TrainingCallback) -> TrainingSetup:
    """Shard the backbone's layers over the processes for good, and verify the prompted model as it now runs."""
    if processes.world_size == 1:
        callback.on_note(
            "one process holds the whole backbone (--shard); start several: torchrun --nproc-per-node 2 ..."
        )
    backbone, prompted = setup.backbone, setup.prompted
    processes.check_equal("the layers' ways to run", prompted.supports_gradient_checkpointing)
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
    prompted: PromptedModel,
    callback: TrainingCallback,
    teacher: Teacher | None,
    context: str,
) -> TrainingSetup:
    """Tokenize every row that will be used, and check that it fits, also after the context of a distillation.

    Raises:
        ValueError: a row does not fit the model, by its number and split.
    """
    settings, backbone = experiment.training, prompted.backbone
    callback.on_stage("tokenizing")
    limit = input_limit(prompted, task, settings)
    if task.is_classification:
        prompted.check_candidates(task.answers, answer_ids(task, backbone.tokenizer))

    def encode_split(split: str, count: int, seed: int) -> Sequence[Example]:
        table = getattr(rows, split)
        if split == "train":
            table = with_answered_turns(task, table)
        examples, shortened = encode(task, backbone.tokenizer, table, limit, closing=prompted.appends_eos)
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
            check_after_context(teacher, context, prompted, task, table, sampled, split)
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


def _check_settings_apply(experiment: Experiment, task: Task, backbone: Backbone) -> None:
    """Refuse settings that would have no effect, or could not work."""
    if not backbone.takes_images and (unused := _changed(experiment, _image_settings)):
        raise ValueError(f"{unused} is for images, and {backbone.source} reads text; leave it out")
    if experiment.baseline != "none" and (unused := _changed(experiment, _prompt_settings)):
        raise ValueError(f"{unused} is for prompts, and the baseline {experiment.baseline} has none; leave it out")
    if experiment.baseline != "none" and experiment.prompt != Experiment().prompt:
        raise ValueError(
            f"a prompt is described ({experiment.prompt}), and the baseline {experiment.baseline} trains none; leave "
            "the method and its settings out"
        )
    if experiment.depth == "deep":
        _check_deep(experiment, backbone)
    limit = backbone.max_positions
    if experiment.baseline == "none" and limit is not None and experiment.prompt.length >= limit:
        raise ValueError(f"length is {experiment.prompt.length}, but {backbone.source} has {limit} positions; lower it")
    head = fresh_head(backbone, len(task.label_words), torch.Generator())
    if experiment.training.zero_shot and head is not None:
        raise ValueError(
            f"zero_shot is on, and {backbone.source} answers through a trained head, so it has no zero-shot answer; "
            "leave it out"
        )
    if experiment.training.vocabulary_weight and head is not None:
        raise ValueError(
            f"vocabulary_weight is {experiment.training.vocabulary_weight}, and {backbone.source} answers through a "
            "trained head, which has no label words; leave it out"
        )
    if experiment.training.vocabulary_weight is not None and not task.is_classification:
        raise ValueError(
            f"vocabulary_weight is {experiment.training.vocabulary_weight}, and task {task.name!r} has no label words; "
            "leave it out"
        )
    if not experiment.training.shots and not experiment.training.shots_balanced:
        raise ValueError("shots_balanced is off, and no shots are drawn; give shots, or leave it out")
    if experiment.context is not None or experiment.demonstrations:
        if head is not None:
            raise ValueError(
                f"a context is to be distilled, and {backbone.source} answers through a trained head, so without "
                "training there is no teacher; use a backbone that answers in words"
            )
        if experiment.training.vocabulary_weight:
            raise ValueError(
                f"vocabulary_weight is {experiment.training.vocabulary_weight}, and a distillation takes its loss from "
                "the teacher; leave it out"
            )
        if experiment.training.shard:
            raise ValueError("shard is on, and the teacher of a distillation is not sharded; leave one of them out")
    elif experiment.training.temperature != 1:
        raise ValueError(
            f"temperature is {experiment.training.temperature}, and only a distillation has one; give a context or "
            "demonstrations, or leave it out"
        )
    if experiment.baseline == "head" and head is None:
        raise ValueError(
            f"{backbone.source} answers with label words and has no head to train; use the baseline lora or full"
        )


def _check_deep(experiment: Experiment, backbone: Backbone) -> None:
    if backbone.max_matrices == 1:
        raise ValueError(
            f"depth is deep, and {backbone.source} ({backbone.architecture}) takes prompts in front of the input only; "
            "use a vision model, or a decoder whose layers have keys and values of one size, or leave depth out"
        )
    if not backbone.takes_images and experiment.prompt_position != "prefix":
        raise ValueError(
            f"depth is deep and prompt_position {experiment.prompt_position!r}, but keys and values of a deep prompt "
            "come before the text; leave one of them out"
        )


def _check_trainable(experiment: Experiment, prompted: PromptedModel) -> None:
    """Refuse settings that the prompted model cannot be trained with."""
    backbone = prompted.backbone
    if (
        experiment.training.dropout
        and prompted.prompt_attention == "self"
        and not prompted.supports_self_attention_dropout
    ):
        raise ValueError(
            f"dropout is on, and prompts with prompt_attention=self run without the dropout of {backbone.source} "
            f"({backbone.architecture}); leave dropout off, or use prompt_attention=full"
        )
    if experiment.training.shard:
        _check_shardable(experiment, prompted)
    if not experiment.training.gradient_checkpointing:
        return
    if not prompted.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing is on, and rows of {backbone.source} continue from a cache, which cannot be "
            "written twice; leave it off, or use depth=shallow, prompt_position=prefix and a model without attention "
            "code of its own"
        )
    if not gradient_checkpointing.layers(backbone.model):
        raise ValueError(
            f"gradient_checkpointing is on, and {backbone.source} ({backbone.model.config.model_type}) has no layers "
            "that can be recomputed; leave it off, or use --gradient-accumulation-steps"
        )


def _check_shardable(experiment: Experiment, prompted: PromptedModel) -> None:
    """Refuse a setup whose backbone cannot be sharded over processes."""
    backbone, why = prompted.backbone, ""
    if backbone.quantized:
        why = f"the weights are quantized ({backbone.quantized})"
    elif experiment.baseline != "none":
        why = f"the baseline {experiment.baseline} trains weights beside or in the layers"
    elif experiment.training.dropout and any(
        value for name, value in backbone.model.config.to_dict().items() if name.endswith("layerdrop")
    ):
        why = f"dropout makes each process leave out other layers of {backbone.source}"
    elif not gradient_checkpointing.layers(backbone.model):
        why = f"{backbone.source} ({backbone.model.config.model_type}) has no layers that can be identified"
    elif not prompted.supports_fsdp:
        why = f"prompts with prompt_attention=self bypass the layers of {backbone.source} ({backbone.architecture})"
    if why:
        raise ValueError(f"shard is on, and {why}; leave it off")


def _changed(experiment: Experiment, settings_of: Callable[[Experiment], Mapping[str, Any]]) -> str | None:
    """The first of these settings that is not at its default."""
    default = settings_of(Experiment())
    return next((name for name, value in settings_of(experiment).items() if value != default[name]), None)


def _prompt_settings(experiment: Experiment) -> Mapping[str, Any]:
    return {name: getattr(experiment, name) for name in ("depth", "prompt_position", "prompt_attention", "init_prompt")}


def _image_settings(experiment: Experiment) -> Mapping[str, Any]:
    training = experiment.training
    return {
        "pool": experiment.pool,
        "image_size": training.image_size,
        "augment": training.augment,
    }
