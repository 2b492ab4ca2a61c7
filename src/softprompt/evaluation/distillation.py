"""How close a prompt comes to the teacher it was distilled from, compared with cheaper ways to provide the context."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.evaluation.predict import Answer, pad_id
from softprompt.models import PromptedModel
from softprompt.models.inputs import Candidates, Ids, Labels, Mask
from softprompt.models.sampling import before_end
from softprompt.models.teacher import Teacher
from softprompt.tasks import Task
from softprompt.tasks.data.collate import answer_labels, collate
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.tokenize import answer_ids

_BATCH = 32


@runtime_checkable
class ScoringModel(Protocol):
    """A model that says how likely answers are: `PromptedModel`, `Teacher`, or a model with the prompts of one call."""

    def label_logits(
        self, input_ids: Ids, attention_mask: Mask, labels: Labels
    ) -> tuple[Float[Tensor, "batch kept vocab"], Int[Tensor, "batch kept"]]:
        """The logits that predict the labels, and the labels."""

    def score(self, input_ids: Ids, attention_mask: Mask, candidates: Candidates) -> Float[Tensor, "batch candidate"]:
        """Log-probability of each candidate."""


@runtime_checkable
class GeneratingModel(ScoringModel, Protocol):
    """A model that also answers: `PromptedModel` or `Teacher`."""

    def generate(self, input_ids: Ids, attention_mask: Mask, *, max_new_tokens: int) -> Iterator[Int[Tensor, " batch"]]:
        """Greedy tokens, one per row and step."""


def token_divergence(
    student: Float[Tensor, "batch kept vocab"],
    teacher: Float[Tensor, "batch kept vocab"],
    targets: Int[Tensor, "batch kept"],
    temperature: float = 1.0,
) -> Float[Tensor, " batch"]:
    """`sum over answer tokens of T² KL(teacher || student)`, both distributions softened by the temperature T.

    Args:
        student: logits that predict `targets`, with a gradient.
        teacher: logits that predict the same tokens after the same answer so far.
        targets: -100 where a row has no answer token; nothing is summed there.
        temperature: above 1 the teacher's less likely tokens count for more; the factor T² keeps the gradient's size.

    Returns:
        Each row's divergence in nats, float32, zero or more.

    Reference: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    answered = targets != -100
    expected = (teacher[answered].float() / temperature).log_softmax(-1)
    predicted = (student[answered].float() / temperature).log_softmax(-1)
    divergence = nn.functional.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1) * temperature**2
    return divergence.new_zeros(targets.shape).masked_scatter(answered, divergence).sum(1)


def label_divergence(
    student: Float[Tensor, "batch candidate"], teacher: Float[Tensor, "batch candidate"], temperature: float = 1.0
) -> Float[Tensor, " batch"]:
    """`T² KL(teacher || student)` over the outcomes "label 1", ..., "label k" and "anything else", softened by T.

    Args:
        student: log-probability of each label's words over the whole vocabulary, with a gradient.
        teacher: the same of the teacher. No label's words begin with another's, so that they sum to at most 1.
        temperature: as in `token_divergence`.

    Returns:
        Each row's divergence in nats, float32.
    """
    expected, predicted = (
        (_with_rest(scores) / temperature).log_softmax(-1) for scores in (teacher.float(), student.float())
    )
    return nn.functional.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1) * temperature**2


def _with_rest(scores: Float[Tensor, "batch candidate"]) -> Float[Tensor, "batch outcome"]:
    # 1 - p is kept away from 0, where its logarithm and the gradient have no finite value.
    rest = (-torch.expm1(scores.logsumexp(-1, keepdim=True))).clamp(min=torch.finfo(torch.float32).eps)
    return torch.cat([scores, rest.log()], -1)


def divergences(
    student: ScoringModel,
    teacher: ScoringModel,
    prompted: PromptedModel,
    task: Task,
    rows: Sequence[Example],
    temperature: float = 1.0,
) -> Float[Tensor, " row"]:
    """Each row's divergence of `student` from `teacher`, at its label words or at its answer's tokens."""
    if task.is_classification:
        batch = collate(rows, pad_id=pad_id(prompted.backbone), side="left", with_answers=False)
        ids, mask = batch.inputs(prompted.backbone.device)
        candidates = answer_ids(task, prompted.backbone.tokenizer)
        return label_divergence(student.score(ids, mask, candidates), teacher.score(ids, mask, candidates), temperature)
    ids, mask, labels = labeled_batch(prompted, rows)
    logits, targets = student.label_logits(ids, mask, labels)
    return token_divergence(logits, teacher.label_logits(ids, mask, labels)[0], targets, temperature)


def labeled_batch(prompted: PromptedModel, rows: Sequence[Example]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows with their answers as `label_logits` takes them: ids, mask and labels on the backbone's device."""
    device = prompted.backbone.device
    in_row = not prompted.appends_eos
    batch = collate(rows, pad_id=pad_id(prompted.backbone), side="left", with_answers=in_row)
    ids, mask = batch.inputs(device)
    if in_row:
        return ids, mask, batch.labels.to(device)
    return ids, mask, answer_labels([prompted.target(row.answer_ids) for row in rows]).to(device)


@final
@dataclass(frozen=True, kw_only=True)
class TeacherComparison:
    """A model's answers to some rows, and how close they are to the teacher's."""

    kl: float
    """Mean divergence from the teacher, in nats per row of a classification, or per answer token."""
    agreement: float
    """Share of rows with exactly the teacher's answer."""
    answers: Sequence[Answer]
    """In the order of the rows."""


@torch.no_grad()
def compare_with_teacher(
    models: Mapping[str, GeneratingModel],
    teacher: Teacher,
    prompted: PromptedModel,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int,
) -> dict[str, TeacherComparison]:
    """Compare each of `models` with the teacher, which is compared with itself under the name `teacher`.

    Args:
        models: prompted models, the bare model, or teachers with another context.
        prompted: how rows are laid out for the backbone.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    answered = {"teacher": teacher, **models}
    total = dict.fromkeys(answered, 0.0)
    answers: dict[str, dict[int, Answer]] = {name: {} for name in answered}
    for batch in batches:
        rows = [examples[index] for index in batch]
        for name, model in answered.items():
            total[name] += float(divergences(model, teacher, prompted, task, rows).sum())
            answers[name].update(zip(batch, answers_of(model, prompted, task, rows, max_new_tokens), strict=True))
    count = len(examples)
    units = count if task.is_classification else sum(len(prompted.target(row.answer_ids)) for row in examples)
    return {
        name: TeacherComparison(
            kl=total[name] / units,
            agreement=sum(answers[name][row].text == answers["teacher"][row].text for row in range(count)) / count,
            answers=[answers[name][row] for row in range(count)],
        )
        for name in answered
    }


def answers_of(
    model: GeneratingModel, prompted: PromptedModel, task: Task, rows: Sequence[Example], max_new_tokens: int
) -> list[Answer]:
    """The greedy answers of `model` to one batch of rows, in their order."""
    backbone = prompted.backbone
    batch = collate(rows, pad_id=pad_id(backbone), side="left", with_answers=False)
    ids, mask = batch.inputs(backbone.device)
    if task.is_classification:
        labels, label_words = list(task.label_words), list(task.label_words.values())
        indices = model.score(ids, mask, answer_ids(task, backbone.tokenizer)).argmax(-1).tolist()
        return [
            Answer(row=row.row, text=label_words[index], label=labels[index], index=index)
            for row, index in zip(rows, indices, strict=True)
        ]
    texts = backbone.tokenizer.batch_decode(
        _generated(model, prompted, ids, mask, max_new_tokens), skip_special_tokens=True
    )
    return [Answer(row=row.row, text=text.strip()) for row, text in zip(rows, texts, strict=True)]


def _generated(
    model: GeneratingModel, prompted: PromptedModel, ids: Tensor, mask: Tensor | None, max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers as tokens, each without its end of sequence."""
    steps = torch.stack(list(model.generate(ids, mask, max_new_tokens=max_new_tokens)), 1).tolist()
    ends = prompted.end_of_sequence()
    return [before_end(row, ends) for row in steps]
