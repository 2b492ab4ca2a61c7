"""One step of a training: the loss of a batch, its gradient over all processes, and AdamW at each group's rate."""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from softprompt.attach import Attachment
from softprompt.baseline import RATES
from softprompt.experiment import Experiment
from softprompt.predict import pad_id
from softprompt.processes import Processes
from softprompt.tasks import Example, Task, answer_ids, answer_labels, collate


@final
class Optimiser:
    """AdamW over what an attachment trains; a step's loss is the mean over the whole batch, however it is cut up."""

    def __init__(self, attachment: Attachment, experiment: Experiment, task: Task, processes: Processes) -> None:
        self.attachment, self.task, self.processes = attachment, task, processes
        self.settings = settings = experiment.training
        rates = experiment.prompt.rates() | {"head": attachment.head_rate, "tuned": RATES[experiment.baseline]}
        self.adamw = torch.optim.AdamW(
            [{"params": group, "rate": rates[name]} for name, group in attachment.groups().items()],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, rows: Sequence[Example], rate: float, number: int) -> float:
        """One step at the learning rate `rate`; its loss.

        Args:
            rows: the whole batch.
            number: of the step, for an error.

        Raises:
            ValueError: the loss or its gradient is no number.
        """
        self.attachment.train()  # a method's own dropout; the backbone stays in evaluation mode
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["rate"]
        weight = len(rows) if self._candidates else sum(len(self._target(row)) for row in rows)
        loss = torch.zeros((), device=self.attachment.backbone.device)
        own = self.processes.share(rows)
        with self.processes.part(), self.attachment.backbone.dropout(self.settings.dropout):
            for part in range(self.settings.accumulate):
                if piece := own[part :: self.settings.accumulate]:
                    piece_loss = self._loss_sum(piece) / weight
                    piece_loss.backward()  # type: ignore[no-untyped-call]
                    loss += piece_loss.detach()
        parameters = list(self.attachment.parameters())
        self.processes.total(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        _refuse_not_finite(float(loss), float(norm), rate, number, rows)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(loss)

    @property
    def _candidates(self) -> bool:
        return self.task.is_classification and (
            self.settings.objective == "candidates" or self.attachment.head is not None
        )

    def _target(self, row: Example) -> tuple[int, ...]:
        return self.attachment.target(row.answer_ids)

    def _loss_sum(self, rows: Sequence[Example]) -> Tensor:
        tokenizer, device = self.attachment.backbone.tokenizer, self.attachment.backbone.device
        joined = not self._candidates and not self.attachment.closed
        batch = collate(rows, pad_id=pad_id(tokenizer), side="left", with_answers=joined)
        ids, mask = batch.inputs(device)
        if self._candidates:
            scores = self.attachment.score(ids, mask, answer_ids(self.task, tokenizer))
            return nn.functional.cross_entropy(scores, batch.classes.to(device), reduction="sum")
        labels = (batch.labels if joined else answer_labels([self._target(row) for row in rows])).to(device)
        loss: Tensor = self.attachment(ids, mask, labels).loss
        return loss * (labels != -100).sum()


def _refuse_not_finite(loss: float, norm: float, rate: float, number: int, rows: Sequence[Example]) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    places = ", ".join(str(row.row) for row in rows)
    raise ValueError(
        f"the loss is {loss} and its gradient's norm {norm} at step {number} with learning rate {rate:.3g} "
        f"on rows {places} of the training split; lower --lr, or use --dtype float32"
    )
