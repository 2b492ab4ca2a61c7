"""Refusals of an experiment before its run's folder is created: settings without effect, or that cannot work."""

from collections.abc import Callable, Mapping
from typing import Any

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.models import PromptedModel, model_class
from softprompt.tasks import Task


def check_settings_apply(experiment: Experiment, task: Task, backbone: Backbone) -> None:
    """Refuse settings that would have no effect, or could not work."""
    if not backbone.takes_images and (unused := _first_changed(experiment, _image_settings)):
        raise ValueError(f"{unused} is for images, but {backbone.source} reads text; leave it out")
    if experiment.baseline != "none" and (unused := _first_changed(experiment, _prompt_settings)):
        raise ValueError(f"{unused} is for prompts, but the baseline {experiment.baseline} has none; leave it out")
    if experiment.baseline != "none" and experiment.prompt != Experiment().prompt:
        raise ValueError(
            f"the method {experiment.prompt.name} is given, but the baseline {experiment.baseline} trains no prompt; "
            "leave the method and its settings out"
        )
    if experiment.depth == "deep":
        _check_deep(experiment, backbone)
    limit = backbone.max_positions
    if experiment.baseline == "none" and limit is not None and experiment.prompt.length >= limit:
        raise ValueError(f"length is {experiment.prompt.length}, but {backbone.source} has {limit} positions; lower it")
    has_head = model_class(backbone).needs_head(backbone)
    if experiment.training.zero_shot and has_head:
        raise ValueError(
            f"zero_shot is on, but {backbone.source} answers through a trained head, so it has no zero-shot answer; "
            "leave it out"
        )
    if experiment.training.vocabulary_weight and has_head:
        raise ValueError(
            f"vocabulary_weight is {experiment.training.vocabulary_weight}, but {backbone.source} answers through a "
            "trained head, which has no label words; leave it out"
        )
    if experiment.training.vocabulary_weight not in (None, 1) and not task.is_classification:
        raise ValueError(
            f"vocabulary_weight is {experiment.training.vocabulary_weight}, but task {task.name!r} has no label words, "
            "so its loss is over the vocabulary; leave it out"
        )
    if not experiment.training.shots and not experiment.training.shots_balanced:
        raise ValueError("shots_balanced is off, but no shots are drawn; give shots, or leave it out")
    if experiment.context is not None or experiment.demonstrations:
        if has_head:
            raise ValueError(
                f"a context is to be distilled, but {backbone.source} answers through a trained head, so without "
                "training there is no teacher; use a backbone that answers in words"
            )
        if experiment.training.vocabulary_weight:
            raise ValueError(
                f"vocabulary_weight is {experiment.training.vocabulary_weight}, but a distillation takes its loss from "
                "the teacher; leave it out"
            )
        if experiment.training.shard:
            raise ValueError("shard is on, but the teacher of a distillation is not sharded; leave one of them out")
    elif experiment.training.temperature != 1:
        raise ValueError(
            f"temperature is {experiment.training.temperature}, but only a distillation has one; give a context or "
            "demonstrations, or leave it out"
        )
    if experiment.baseline == "head" and not has_head:
        raise ValueError(
            f"{backbone.source} answers with label words and has no head to train; use the baseline lora or full"
        )


def _check_deep(experiment: Experiment, backbone: Backbone) -> None:
    if backbone.max_matrices == 1:
        raise ValueError(
            f"depth is deep, but {backbone.source} ({backbone.architecture}) takes prompts in front of the input only; "
            "use a vision model, or a decoder whose layers have keys and values of one size, or leave depth out"
        )
    if not backbone.takes_images and experiment.prompt_position != "prefix":
        raise ValueError(
            f"depth is deep and prompt_position {experiment.prompt_position!r}, but keys and values of a deep prompt "
            "come before the text; leave one of them out"
        )


def check_trainable(experiment: Experiment, prompted: PromptedModel) -> None:
    """Refuse settings that the prompted model cannot be trained with."""
    backbone = prompted.backbone
    if (
        experiment.training.dropout
        and prompted.prompt_attention == "self"
        and not prompted.supports_self_attention_dropout
    ):
        raise ValueError(
            f"dropout is on, but prompts with prompt_attention=self run without the dropout of {backbone.source} "
            f"({backbone.architecture}); leave dropout off, or use prompt_attention=full"
        )
    if experiment.training.shard:
        check_shardable(experiment, prompted)
    if not experiment.training.gradient_checkpointing:
        return
    if not prompted.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing is on, but rows of {backbone.source} continue from a cache, which cannot be "
            "written twice; leave it off, or use depth=shallow, prompt_position=prefix and a model without attention "
            "code of its own"
        )
    if not gradient_checkpointing.layers(backbone.model):
        raise ValueError(
            f"gradient_checkpointing is on, but {backbone.source} ({backbone.model.config.model_type}) has no layers "
            "that can be recomputed; leave it off, or use --gradient-accumulation-steps"
        )


def check_shardable(experiment: Experiment, prompted: PromptedModel) -> None:
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
        raise ValueError(f"shard is on, but {why}; leave it off")


def _first_changed(experiment: Experiment, settings_of: Callable[[Experiment], Mapping[str, Any]]) -> str | None:
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
