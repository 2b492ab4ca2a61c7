"""The training loss: each row's loss, and what their sum over a batch is divided by."""

from collections.abc import Hashable, Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from softprompt.config import DEFAULT_VOCABULARY_WEIGHT, TrainingConfig
from softprompt.evaluation.distillation import divergences
from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel
from softprompt.models.inputs import Candidates, Ids, Labels, Mask
from softprompt.models.teacher import Teacher
from softprompt.prompts import SoftPrompt
from softprompt.tasks import Task
from softprompt.tasks.data.collate import answer_labels, collate
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.tokenize import answer_ids


@final
class Objective:
    """`CE among the label words + vocabulary_weight * -log P(label words)` for classification, averaged over rows.

    At weight 1 the two sum to the cross-entropy of the answer over the vocabulary. It is then computed as such, without
    the other label words, and averaged over tokens, as the papers do; the two averages differ if label words have
    several tokens. Tasks without label words always use it.

    With a `teacher` it is the divergence from the teacher instead (`evaluation.distillation.divergences`).
    """

    def __init__(
        self, prompted: PromptedModel, task: Task, settings: TrainingConfig, teacher: Teacher | None = None
    ) -> None:
        self.prompted, self.task, self.teacher = prompted, task, teacher
        self._temperature = settings.temperature
        default = DEFAULT_VOCABULARY_WEIGHT if prompted.head is None else 0.0
        weight = settings.vocabulary_weight
        self._vocabulary_weight = default if weight is None else weight

    def losses(
        self, rows: Sequence[Example], prompts: Sequence[SoftPrompt] | None = None, index: Tensor | None = None
    ) -> Float[Tensor, " row"]:
        """Each row's loss, float32.

        Args:
            prompts: used instead of the model's own prompt.
            index: for each row, the index of its prompt in `prompts`.
        """
        if self.teacher is not None:
            student = _Student(self.prompted, prompts, index)
            return divergences(student, self.teacher, self.prompted, self.task, rows, self._temperature)
        tokenizer, device = self.prompted.backbone.tokenizer, self.prompted.backbone.device
        with_answers = not self._scores_candidates and not self.prompted.appends_eos
        batch = collate(rows, pad_id=pad_id(self.prompted.backbone), side="left", with_answers=with_answers)
        ids, mask = batch.inputs(device)
        if self._scores_candidates:
            scores = self.prompted.score(ids, mask, answer_ids(self.task, tokenizer), prompts, index)
            losses = nn.functional.cross_entropy(scores, batch.classes.to(device), reduction="none")
            # No label word is the beginning of another, so their probabilities add up.
            return losses - self._vocabulary_weight * scores.logsumexp(-1) if self._vocabulary_weight else losses
        labels = (batch.labels if with_answers else answer_labels([self._target(row) for row in rows])).to(device)
        return self.prompted.losses(ids, mask, labels, prompts, index)

    def weight(self, rows: Sequence[Example]) -> float:
        """The number of rows, or of answer tokens, that the sum of the rows' losses is divided by."""
        return float(len(rows) if self._scores_candidates else sum(len(self._target(row)) for row in rows))

    @property
    def sharing_key(self) -> Hashable:
        """Objectives with equal keys give a row the same loss."""
        if self.teacher is not None:
            return id(self.teacher), self._temperature
        if not self._scores_candidates:
            return None
        return answer_ids(self.task, self.prompted.backbone.tokenizer), self._vocabulary_weight

    @property
    def _scores_candidates(self) -> bool:
        if self.teacher is not None:
            return self.task.is_classification
        return self.task.is_classification and (self._vocabulary_weight < 1 or self.prompted.head is not None)

    def _target(self, row: Example) -> tuple[int, ...]:
        return self.prompted.target(row.answer_ids)


class _Student:
    """The model being trained, with the prompts of one call."""

    def __init__(self, prompted: PromptedModel, prompts: Sequence[SoftPrompt] | None, index: Tensor | None) -> None:
        self._prompted, self._prompts, self._index = prompted, prompts, index

    def label_logits(self, input_ids: Ids, attention_mask: Mask, labels: Labels) -> tuple[Tensor, Tensor]:
        return self._prompted.label_logits(input_ids, attention_mask, labels, self._prompts, self._index)

    def score(self, input_ids: Ids, attention_mask: Mask, candidates: Candidates) -> Tensor:
        return self._prompted.score(input_ids, attention_mask, candidates, self._prompts, self._index)
