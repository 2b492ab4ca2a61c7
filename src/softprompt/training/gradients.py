"""The loss's gradient at a prompt, over training rows: where a method may start, and whose rank may be looked at."""

from collections.abc import Callable

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.evaluation.predict import input_limit
from softprompt.models import attach, fresh_head
from softprompt.prompts.plain import PlainPrompt
from softprompt.runs import Gradient
from softprompt.tasks import Task, encode, schedule
from softprompt.training.objective import Objective


def gradient_on(
    experiment: Experiment, task: Task, backbone: Backbone, rows: Callable[[], Dataset] | Dataset
) -> Gradient:
    """The experiment's loss's mean gradient at any prompt of one layer, over its first batches of `rows`.

    The batches are those that the training will begin with, in as many parts; the model's own dropout is off, and a
    head is as before its first step. Costs a tokenisation of the rows and a training step a batch, when it is called.

    Args:
        rows: the training rows, or what reads them.
    """

    def gradient(prompt: Float[Tensor, "length dim"], batches: int) -> Float[Tensor, "length dim"]:
        settings, generator = experiment.training, torch.Generator().manual_seed(experiment.seed)
        if settings.shard:
            raise ValueError(
                "the prompt is to start from the gradient and shard is on, whose layers are not shared out yet when a "
                "prompt is made; choose another start, or leave shard off"
            )
        leaf = PlainPrompt(prompt.detach().clone(), 1.0).to(backbone.device)
        head = fresh_head(backbone, len(task.label_words), generator, experiment.pool)
        prompted = attach(
            backbone,
            leaf,
            head=head,
            prompt_position=experiment.prompt_position,
            prompt_attention=experiment.prompt_attention,
        )
        objective = Objective(prompted, task, settings)
        table = rows() if callable(rows) else rows
        limit = input_limit(prompted, task, settings)
        examples = encode(task, backbone.tokenizer, table, limit, closing=prompted.appends_eos)[0]
        order = schedule([len(example.input_ids) for example in examples], settings.batch_size, experiment.seed)
        total = torch.zeros_like(leaf.matrix)
        for _ in range(batches):
            batch = [examples[place] for place in next(order)[1]]
            weight = objective.weight(batch)
            for part in range(settings.gradient_accumulation_steps):
                if piece := batch[part :: settings.gradient_accumulation_steps]:
                    with gradient_checkpointing(backbone.model, settings.gradient_checkpointing):
                        loss = objective.losses(piece).sum() / weight
                        total += torch.autograd.grad(loss, leaf.matrix)[0]
        return (total / batches).cpu()

    return gradient
