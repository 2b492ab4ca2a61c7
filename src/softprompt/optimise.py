"""One step of a training: the loss of a batch, its gradient over all processes, and AdamW at each group's rate.

A training asks for the gradient of its rows and waits: whoever drives it (`together`) may compute it in one pass with
those of other trainings on the same backbone.
"""

import math
import time
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn

from softprompt.attach import Attachment
from softprompt.baseline import RATES
from softprompt.experiment import Experiment
from softprompt.objective import Objective
from softprompt.processes import Processes
from softprompt.prompts import SoftPrompt
from softprompt.recompute import recomputing
from softprompt.tasks import Example, Task

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Wanted:
    """Rows whose loss, summed and divided by `weight`, and whose gradient a training waits for."""

    optimiser: "Optimiser"
    rows: Sequence[Example]
    weight: float


class Given(NamedTuple):
    """What it is given, once the gradient is in its parameters."""

    loss: Tensor
    seconds: float
    """The training's share of the time that it took; of a step, with what it did itself."""


Steps = Generator[Wanted, Given, T]
"""A training: it asks for gradients until it returns what came of it."""


@final
class Optimiser:
    """AdamW over what an attachment trains; a step's loss is the mean over the whole batch, however it is cut up."""

    def __init__(self, attachment: Attachment, experiment: Experiment, task: Task, processes: Processes) -> None:
        self.attachment, self.task, self.processes = attachment, task, processes
        self.settings = settings = experiment.training
        self.objective = Objective(attachment, task, settings)
        rates = experiment.prompt.rates() | {"head": attachment.head_rate, "tuned": RATES[experiment.baseline]}
        self.adamw = torch.optim.AdamW(
            [{"params": group, "rate": rates[name]} for name, group in attachment.groups().items()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, rows: Sequence[Example], rate: float, number: int) -> Steps[Given]:
        """One step at the learning rate `rate`; its loss.

        Args:
            rows: the whole batch.
            number: of the step, for an error.

        Raises:
            ValueError: the loss or its gradient is no number.
        """
        start, waited, seconds = time.perf_counter(), 0.0, 0.0
        self.attachment.train()  # a method's own dropout; the backbone stays in evaluation mode
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["rate"]
        weight = self.objective.weight(rows)
        loss = torch.zeros((), device=self.attachment.backbone.device)
        own = self.processes.share(rows)
        with self.processes.passes():
            for part in range(self.settings.accumulate):
                piece = own[part :: self.settings.accumulate]
                if not piece and not self.processes.sharded:
                    continue
                asked = time.perf_counter()
                # A pass that others meet in is made without rows too, over one that counts for nothing.
                given = yield Wanted(self, piece or rows[:1], weight if piece else math.inf)
                waited += time.perf_counter() - asked
                seconds += given.seconds
                loss += given.loss
        parameters = list(self.attachment.parameters())
        self.processes.total(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        _refuse_not_finite(float(loss), float(norm), rate, number, rows)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return Given(loss, seconds + time.perf_counter() - start - waited)

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
    places = ", ".join(str(row.row) for row in rows)
    raise ValueError(
        f"the loss is {loss} and its gradient's norm {norm} at step {number} with learning rate {rate:.3g} "
        f"on rows {places} of the training split; lower --lr, or use --dtype float32"
    )
