"""What a training minimises: each row's loss, and what their sum over a batch is divided by."""

from collections.abc import Hashable, Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from softprompt.config import TrainingConfig
from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel
from softprompt.prompts import SoftPrompt
from softprompt.tasks import Example, Task, answer_ids, answer_labels, collate


@final
class Objective:
    """`CE among the label words + vocabulary_weight * -log P(label words)` for a classification, in the mean over rows.

    At weight 1 the two are the cross-entropy of the answer over the vocabulary, which is then computed as such, without
    the other label words, and in the mean over tokens, as the papers do; the two means differ where label words are
    several tokens. Texts have no label words and always take that.
    """

    def __init__(self, prompted: PromptedModel, task: Task, settings: TrainingConfig) -> None:
        self.prompted, self.task = prompted, task
        self._weight = settings.vocabulary_weight

    def weight(self, rows: Sequence[Example]) -> float:
        """What the sum of the rows' losses is divided by: rows, or tokens."""
        return float(len(rows) if self._candidates else sum(len(self._target(row)) for row in rows))

    @property
    def kind(self) -> Hashable:
        """Objectives of one kind give a row the same loss."""
        words = answer_ids(self.task, self.prompted.backbone.tokenizer) if self._candidates else None
        return words, self._weight if self._candidates else None

    def losses(
        self, rows: Sequence[Example], prompts: Sequence[SoftPrompt] | None = None, index: Tensor | None = None
    ) -> Float[Tensor, " row"]:
        """Each row's loss, float32.

        Args:
            prompts: in place of the attachment's own; `index` says which is a row's.
        """
        tokenizer, device = self.prompted.backbone.tokenizer, self.prompted.backbone.device
        joined = not self._candidates and not self.prompted.appends_eos
        batch = collate(rows, pad_id=pad_id(self.prompted.backbone), side="left", with_answers=joined)
        ids, mask = batch.inputs(device)
        if self._candidates:
            scores = self.prompted.score(ids, mask, answer_ids(self.task, tokenizer), prompts, index)
            among = nn.functional.cross_entropy(scores, batch.classes.to(device), reduction="none")
            # No label word begins another, so that their probabilities add up.
            return among - self._weight * scores.logsumexp(-1) if self._weight else among
        labels = (batch.labels if joined else answer_labels([self._target(row) for row in rows])).to(device)
        return self.prompted.losses(ids, mask, labels, prompts, index)

    @property
    def _candidates(self) -> bool:
        return self.task.is_classification and (self._weight < 1 or self.prompted.head is not None)

    def _target(self, row: Example) -> tuple[int, ...]:
        return self.prompted.target(row.answer_ids)
