"""One training step: forward, loss, backward, clipping, and AdamW at each parameter group's learning rate."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing
from softprompt.config import Experiment
from softprompt.models import PromptedModel
from softprompt.models.baselines import RATES
from softprompt.models.teacher import Teacher
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example
from softprompt.training.distributed import DistributedGroup
from softprompt.training.objective import Objective


@final
@dataclass(frozen=True)
class GradientRequest:
    """One micro-batch; its loss is the sum of the rows' losses divided by `weight`."""

    training_step: "TrainingStep"
    rows: Sequence[Example]
    weight: float


class GradientResult(NamedTuple):
    """The loss of a micro-batch, whose gradient has been added to the parameters' `grad`."""

    loss: Tensor
    waited: float = 0.0
    """Seconds spent on the gradients of other runs."""


class StepResult(NamedTuple):
    """The loss of the whole batch, and the seconds that the step took."""

    loss: float
    seconds: float


Differentiate = Callable[[GradientRequest], GradientResult]
"""Computes a micro-batch's loss and gradient: `differentiate`, or for concurrent runs one pass over the rows of all."""


def differentiate(request: GradientRequest) -> GradientResult:
    """Forward, loss and backward of one micro-batch."""
    training_step = request.training_step
    with training_step.backbone_modes():
        loss = training_step.objective.losses(request.rows).sum() / request.weight
        loss.backward()  # type: ignore[no-untyped-call]
    return GradientResult(loss.detach())


@final
class TrainingStep:
    """Optimizer steps on the trainable parameters; the loss is the mean over the batch, however it is split.

    Args:
        differentiate: computes losses and gradients; other than the default only for concurrent runs.
        teacher: whose distribution to imitate, in a distillation.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        experiment: Experiment,
        task: Task,
        processes: DistributedGroup,
        differentiate: Differentiate = differentiate,
        teacher: Teacher | None = None,
    ) -> None:
        self.prompted, self.processes = prompted, processes
        self.settings = settings = experiment.training
        self.objective = Objective(prompted, task, settings, teacher)
        self._differentiate = differentiate
        factors = experiment.prompt.rates() | {"head": prompted.head_rate, "tuned": RATES[experiment.baseline]}
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "lr_factor": factors[name]} for name, group in prompted.groups().items()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, rows: Sequence[Example], lr: float, number: int) -> StepResult:
        """Train on one batch.

        Args:
            rows: the batch of all processes together.
            lr: the learning rate, which each parameter group scales by its own factor.
            number: the number of the step, for an error message.

        Raises:
            ValueError: the loss or the gradient's norm is not finite.
        """
        started, waited = time.perf_counter(), 0.0
        self.prompted.train()  # for a method's own dropout; the backbone stays in eval mode
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        loss = torch.zeros((), device=self.prompted.backbone.device)
        with self.processes.forward_scope():
            for micro_batch in self._micro_batches(rows):
                result = self._differentiate(micro_batch)  # forward, loss, backward
                loss += result.loss
                waited += result.waited
        parameters = list(self.prompted.parameters())
        self.processes.all_reduce(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        _check_finite(float(loss), float(norm), lr, number, rows)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(float(loss), time.perf_counter() - started - waited)

    def _micro_batches(self, rows: Sequence[Example]) -> Iterator[GradientRequest]:
        """Split this process's share of the batch for gradient accumulation; weights are those of the whole batch."""
        weight, parts = self.objective.weight(rows), self.settings.gradient_accumulation_steps
        local_rows = self.processes.share(rows)
        for part in range(parts):
            if micro_batch := local_rows[part::parts]:
                yield GradientRequest(self, micro_batch, weight)
            elif self.processes.sharded:
                # With a sharded backbone every process must take part in each pass: one row that counts for nothing.
                yield GradientRequest(self, rows[:1], math.inf)

    @contextmanager
    def backbone_modes(self) -> Iterator[None]:
        """The backbone's dropout and gradient checkpointing, for both the forward and the backward pass."""
        backbone, settings = self.prompted.backbone, self.settings
        with (
            backbone.dropout(settings.dropout),
            gradient_checkpointing(backbone.model, settings.gradient_checkpointing),
        ):
            yield

    @property
    def sharing_key(self) -> Hashable:
        """Runs with equal keys can share a forward pass: their rows differ only in the prompt."""
        prompted = self.prompted
        if prompted.prompt is None or prompted.head is not None or self.settings.dropout:
            return id(self)
        return (
            id(prompted.backbone.model),
            prompted.prompt_position,
            prompted.prompt_attention,
            prompted.prompt.num_matrices,
            self.objective.sharing_key,
            self.settings.gradient_checkpointing,
        )


def _check_finite(loss: float, norm: float, lr: float, number: int, rows: Sequence[Example]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    names = ", ".join(row.where for row in rows)
    raise ValueError(
        f"the loss is {loss} and its gradient's norm {norm} at step {number} with learning rate {lr:.3g} "
        f"on {names}; lower --lr, or use --dtype float32"
    )
