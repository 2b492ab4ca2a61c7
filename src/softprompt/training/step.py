"""One step of a training: forward, loss, backward, clipping, and AdamW at each group's rate."""

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
from softprompt.prompts import SoftPrompt
from softprompt.tasks import Example, Task
from softprompt.training.distributed import DistributedGroup
from softprompt.training.objective import Objective


@final
@dataclass(frozen=True)
class GradientRequest:
    """Rows whose loss is summed, divided by `weight` and differentiated."""

    training_step: "TrainingStep"
    rows: Sequence[Example]
    weight: float


class GradientResult(NamedTuple):
    """What came of it, once the gradient has been added to the parameters' own."""

    loss: Tensor
    seconds: float
    """The training's share of the time that it took."""


Differentiate = Callable[[GradientRequest], GradientResult]
"""Computes a loss and its gradient: `differentiate`, or one that serves several trainings in one pass."""


def differentiate(wanted: GradientRequest) -> GradientResult:
    """Forward, loss and backward of one training's rows."""
    start, training_step = time.perf_counter(), wanted.training_step
    with training_step.modes():
        loss = training_step.losses(wanted.rows).sum() / wanted.weight
        loss.backward()  # type: ignore[no-untyped-call]
    wait_for_device(loss)
    return GradientResult(loss.detach(), time.perf_counter() - start)


def wait_for_device(loss: Tensor) -> None:
    """Until a GPU has done what it was given, so that seconds are those of the work."""
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)


@final
class TrainingStep:
    """AdamW over what an attachment trains; a step's loss is the mean over the whole batch, however it is cut up.

    Args:
        differentiate: who computes losses and gradients; other than the default where trainings share a pass.
    """

    def __init__(
        self,
        prompted: PromptedModel,
        experiment: Experiment,
        task: Task,
        processes: DistributedGroup,
        differentiate: Differentiate = differentiate,
    ) -> None:
        self.prompted, self.task, self.processes = prompted, task, processes
        self.settings = settings = experiment.training
        self._differentiate = differentiate
        self.objective = Objective(prompted, task, settings)
        rates = experiment.prompt.rates() | {"head": prompted.head_rate, "tuned": RATES[experiment.baseline]}
        self.adamw = torch.optim.AdamW(
            [{"params": group, "rate": rates[name]} for name, group in prompted.groups().items()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, rows: Sequence[Example], rate: float, number: int) -> GradientResult:
        """One step over `rows`, the whole batch, at the learning rate `rate`; its loss, and the time that it took.

        Args:
            number: of the step, for an error.

        Raises:
            ValueError: the loss or its gradient is no number.
        """
        start, shared = time.perf_counter(), 0.0
        self.prompted.train()  # a method's own dropout; the backbone stays in evaluation mode
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["rate"]
        loss = torch.zeros((), device=self.prompted.backbone.device)
        with self.processes.forward_scope():
            for wanted in self._parts(rows):
                asked = time.perf_counter()
                given = self._differentiate(wanted)  # forward, loss, backward
                loss += given.loss
                shared += given.seconds - (time.perf_counter() - asked)
        parameters = list(self.prompted.parameters())
        self.processes.all_reduce(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf)
        _refuse_not_finite(float(loss), float(norm), rate, number, rows)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return GradientResult(loss, time.perf_counter() - start + shared)

    def _parts(self, rows: Sequence[Example]) -> Iterator[GradientRequest]:
        """The process's share of the batch, cut for gradient accumulation; each part weighs as in the whole batch."""
        weight = self.objective.weight(rows)
        own = self.processes.share(rows)
        for part in range(self.settings.gradient_accumulation_steps):
            if piece := own[part :: self.settings.gradient_accumulation_steps]:
                yield GradientRequest(self, piece, weight)
            elif self.processes.sharded:
                # A pass that others meet in is made without rows too, over one that counts for nothing.
                yield GradientRequest(self, rows[:1], math.inf)

    @property
    def kind(self) -> Hashable:
        """Trainings of one kind may go through one pass: the rows of each differ in their prompt alone."""
        prompted = self.prompted
        if prompted.prompt is None or prompted.head is not None or self.settings.dropout:
            return id(self)
        means = self.settings.gradient_checkpointing
        return (
            id(prompted.backbone.model),
            prompted.prompt_position,
            prompted.prompt_attention,
            self.objective.kind,
            means,
        )

    @contextmanager
    def modes(self) -> Iterator[None]:
        """The backbone as it is while a loss is computed and while it is differentiated."""
        backbone, settings = self.prompted.backbone, self.settings
        with (
            backbone.dropout(settings.dropout),
            gradient_checkpointing(backbone.model, settings.gradient_checkpointing),
        ):
            yield

    def losses(
        self, rows: Sequence[Example], prompts: Sequence[SoftPrompt] | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Each row's loss, to be asked for and differentiated in its `modes`.

        Args:
            prompts: in place of the attachment's own; `index` says which is a row's.
        """
        return self.objective.losses(rows, prompts, index)


def _refuse_not_finite(loss: float, norm: float, rate: float, number: int, rows: Sequence[Example]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    names = ", ".join(row.where for row in rows)
    raise ValueError(
        f"the loss is {loss} and its gradient's norm {norm} at step {number} with learning rate {rate:.3g} "
        f"on {names}; lower --lr, or use --dtype float32"
    )
