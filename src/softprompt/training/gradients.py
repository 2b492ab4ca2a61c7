"""The mean gradient of the loss at a prompt: where a method may initialize, and what rank analysis examines."""

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.evaluation.predict import input_limit
from softprompt.models import attach, fresh_head
from softprompt.models.teacher import Teacher
from softprompt.prompts.plain import PlainPrompt
from softprompt.runs import Gradient
from softprompt.tasks import Task
from softprompt.tasks.data.chat import with_answered_turns
from softprompt.tasks.data.collate import schedule
from softprompt.tasks.data.tokenize import encode
from softprompt.training.objective import Objective


def gradient_on(
    experiment: Experiment,
    task: Task,
    backbone: Backbone,
    rows: Dataset,
    teacher: Teacher | None = None,
) -> Gradient:
    """Return a function that computes the mean gradient of the experiment's loss at a prompt, over its first batches.

    The batches and micro-batches are those that training begins with. The model's own dropout is off, and a head is at
    its initialization. Each call tokenizes the rows and costs one forward and backward pass per batch.

    Args:
        rows: the training rows.
        teacher: of a distillation.

    Returns:
        The function takes a prompt and a number of batches, and returns the gradient with respect to the prompt's
        vectors, both in the units of the backbone's embeddings.
    """

    def gradient(prompt: Float[Tensor, "length dim"], batches: int) -> Float[Tensor, "length dim"]:
        settings, generator = experiment.training, torch.Generator().manual_seed(experiment.seed)
        leaf = PlainPrompt(prompt.detach().clone(), 1.0).to(backbone.device)
        head = fresh_head(backbone, len(task.label_words), generator, experiment.pool)
        prompted = attach(
            backbone,
            leaf,
            head=head,
            prompt_position=experiment.prompt_position,
            prompt_attention=experiment.prompt_attention,
        )
        objective = Objective(prompted, task, settings, teacher)
        table = with_answered_turns(task, rows)
        limit = input_limit(prompted, task, settings)
        examples = encode(task, backbone.tokenizer, table, limit, appends_eos=prompted.appends_eos)[0]
        order = schedule([len(example.input_ids) for example in examples], settings.batch_size, experiment.seed)
        total, parts = torch.zeros_like(leaf.matrix), settings.gradient_accumulation_steps
        for _ in range(batches):
            batch = [examples[index] for index in next(order)[1]]
            weight = objective.weight(batch)
            for part in range(parts):
                if micro_batch := batch[part::parts]:
                    with gradient_checkpointing(backbone.model, settings.gradient_checkpointing):
                        loss = objective.losses(micro_batch).sum() / weight
                        total += torch.autograd.grad(loss, leaf.matrix)[0]
        return (total / batches).cpu()

    return gradient
