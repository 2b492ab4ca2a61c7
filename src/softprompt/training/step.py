"""One step of a training: forward, loss, backward, clipping, and AdamW at each group's rate."""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from softprompt.backbones.kernels.gradient_checkpointing import recomputing
from softprompt.config import Experiment
from softprompt.models import Attachment
from softprompt.models.baselines import RATES
from softprompt.prompts import SoftPrompt
from softprompt.tasks import Example, Task
from softprompt.training.distributed import Processes
from softprompt.training.objective import Objective


@final
@dataclass(frozen=True)
class Wanted:
    """Rows whose loss is summed, divided by `weight` and differentiated."""

    optimiser: "Optimiser"
    rows: Sequence[Example]
    weight: float


class Given(NamedTuple):
    """What came of it, once the gradient has been added to the parameters' own."""

    loss: Tensor
    seconds: float
    """The training's share of the time that it took."""


Differentiate = Callable[[Wanted], Given]
"""Computes a loss and its gradient: `differentiate`, or one that serves several trainings in one pass."""


def differentiate(wanted: Wanted) -> Given:
    """Forward, loss and backward of one training's rows."""
    start, optimiser = time.perf_counter(), wanted.optimiser
    with optimiser.modes():
        loss = optimiser.losses(wanted.rows).sum() / wanted.weight
        loss.backward()  # type: ignore[no-untyped-call]
    wait_for_device(loss)
    return Given(loss.detach(), time.perf_counter() - start)


def wait_for_device(loss: Tensor) -> None:
    """Until a GPU has done what it was given, so that seconds are those of the work."""
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)


@final
class Optimiser:
    """AdamW over what an attachment trains; a step's loss is the mean over the whole batch, however it is cut up.

    Args:
        differentiate: who computes losses and gradients; other than the default where trainings share a pass.
    """

    def __init__(
        self,
        attachment: Attachment,
        experiment: Experiment,
        task: Task,
        processes: Processes,
        differentiate: Differentiate = differentiate,
    ) -> None:
        self.attachment, self.task, self.processes = attachment, task, processes
        self.settings = settings = experiment.training
        self._differentiate = differentiate
        self.objective = Objective(attachment, task, settings)
        rates = experiment.prompt.rates() | {"head": attachment.head_rate, "tuned": RATES[experiment.baseline]}
        self.adamw = torch.optim.AdamW(
            [{"params": group, "rate": rates[name]} for name, group in attachment.groups().items()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, rows: Sequence[Example], rate: float, number: int) -> Given:
        """One step over `rows`, the whole batch, at the learning rate `rate`; its loss, and the time that it took.

        Args:
            number: of the step, for an error.

        Raises:
            ValueError: the loss or its gradient is no number.
        """
        start, shared = time.perf_counter(), 0.0
        self.attachment.train()  # a method's own dropout; the backbone stays in evaluation mode
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["rate"]
        loss = torch.zeros((), device=self.attachment.backbone.device)
        with self.processes.passes():
            for wanted in self._parts(rows):
                asked = time.perf_counter()
                given = self._differentiate(wanted)  # forward, loss, backward
                loss += given.loss
                shared += given.seconds - (time.perf_counter() - asked)
        parameters = list(self.attachment.parameters())
        self.processes.total(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        _refuse_not_finite(float(loss), float(norm), rate, number, rows)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return Given(loss, time.perf_counter() - start + shared)

    def _parts(self, rows: Sequence[Example]) -> Iterator[Wanted]:
        """The process's share of the batch, cut for gradient accumulation; each part weighs as in the whole batch."""
        weight = self.objective.weight(rows)
        own = self.processes.share(rows)
        for part in range(self.settings.accumulate):
            if piece := own[part :: self.settings.accumulate]:
                yield Wanted(self, piece, weight)
            elif self.processes.sharded:
                # A pass that others meet in is made without rows too, over one that counts for nothing.
                yield Wanted(self, rows[:1], math.inf)

    @property
    def kind(self) -> Hashable:
        """Trainings of one kind may go through one pass: the rows of each differ in their prompt alone."""
        attachment = self.attachment
        if attachment.prompt is None or attachment.head is not None or self.settings.dropout:
            return id(self)
        means = self.settings.gradient_checkpointing
        return id(attachment.backbone.model), attachment.place, attachment.attend, self.objective.kind, means

    @contextmanager
    def modes(self) -> Iterator[None]:
        """The backbone as it is while a loss is computed and while it is differentiated."""
        backbone, settings = self.attachment.backbone, self.settings
        with backbone.dropout(settings.dropout), recomputing(backbone.model, settings.gradient_checkpointing):
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
