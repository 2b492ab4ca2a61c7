"""A teacher reads its context before every row: equal to the context and each row in one text, alone."""

from collections.abc import Callable

import pytest
import torch
from tests.parity.cases import assert_near, padded, rows_of
from torch import Tensor, nn

from softprompt import Backbone, attach
from softprompt.evaluation.distillation import label_divergence, token_divergence
from softprompt.models.teacher import Teacher

MakeBackbone = Callable[[str], Backbone]
CONTEXT = [0, 17, 33, 50, 21]
"""With the token 0 that the tests' tokenizer begins a text with."""


def teacher(backbone: Backbone) -> Teacher:
    return Teacher(attach(backbone), CONTEXT, leading=1)


def alone(backbone: Backbone, row: Tensor) -> Tensor:
    """Log-probabilities after each token of the context and a row, whose own beginning token is left out."""
    ids = torch.cat([torch.tensor(CONTEXT), row[1:]])[None]
    with torch.no_grad():
        return backbone.model(input_ids=ids).logits[0].log_softmax(-1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_equal_one_text_for_rows_of_any_length(decoder: Backbone, side: str) -> None:
    rows = rows_of([2, 7, 4], front=[0])
    ids, mask = padded(rows, side, extra=2)
    candidates = [(9,), (40, 8)]
    scores = teacher(decoder).score(ids, mask, candidates)
    for row, found in zip(rows, scores, strict=True):
        expected = [alone(decoder, row)[-1, 9]]
        longer = alone(decoder, torch.cat([row, torch.tensor([40])]))
        expected.append(longer[-2, 40] + longer[-1, 8])
        assert_near(found, torch.stack(expected))


def test_label_logits_have_the_columns_of_the_student(decoder: Backbone) -> None:
    rows = rows_of([3, 6, 4], front=[0])
    ids, mask = padded(rows, "left", extra=3)
    labels = torch.full_like(ids, -100)
    for index, count in enumerate((1, 3, 2)):
        labels[index, -count:] = ids[index, -count:]
    logits, targets = teacher(decoder).label_logits(ids, mask, labels)
    _, of_student = attach(decoder).label_logits(ids, mask, labels)
    assert torch.equal(targets, of_student)
    for index, (row, count) in enumerate(zip(rows, (1, 3, 2), strict=True)):
        answered = targets[index] != -100
        assert_near(logits[index][answered].log_softmax(-1), alone(decoder, row)[-count - 1 : -1])


@pytest.mark.parametrize("name", ["t5", "bert_mlm"])
def test_other_architectures_read_the_context_with_each_row(tiny_backbone: MakeBackbone, name: str) -> None:
    backbone = tiny_backbone(name)
    closing = [1] if name == "t5" else [3, 1]  # an encoder answers at its mask
    front = [] if name == "t5" else [0]
    rows = rows_of([3, 6], front=front, back=closing)
    ids, mask = padded(rows, "left", extra=2)
    found = Teacher(attach(backbone), [*front, 17, 33, 50], leading=len(front)).score(ids, mask, [(9,), (40,)])
    for row, scores in zip(rows, found, strict=True):
        text = torch.cat([torch.tensor([*front, 17, 33, 50]), row[len(front) :]])[None]
        assert_near(scores, attach(backbone).score(text, None, [(9,), (40,)])[0])


def test_rows_that_begin_otherwise_lose_no_token(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    row = torch.tensor([8, 9, 10])
    found = teacher(backbone).score(row[None], None, [(9,)])[0, 0]
    ids = torch.cat([torch.tensor(CONTEXT), row])[None]
    with torch.no_grad():
        assert_near(found, backbone.model(input_ids=ids).logits[0, -1].log_softmax(-1)[9])


def test_a_context_without_a_token_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="the context has no token"):
        Teacher(attach(tiny_backbone("llama")), [0], leading=1)


def test_token_divergence_equals_torchs_and_ignores_unanswered_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    student, expert = (torch.randn(2, 3, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([[-100, 1, 2], [3, -100, -100]])
    student.requires_grad_()
    found = token_divergence(student, expert, targets, temperature=2.0)
    p, q = (expert.float() / 2).softmax(-1), (student.float() / 2).softmax(-1)
    each = 4 * (p * (p / q).log()).sum(-1)
    assert_near(found, torch.stack([each[0, 1] + each[0, 2], each[1, 0]]))
    assert float(token_divergence(expert, expert, targets).abs().max()) < 1e-6
    [gradient] = torch.autograd.grad(found.sum(), student)
    # d/dz of T² KL(p || softmax(z / T)) is T (q - p).
    assert_near(gradient[0, 1].float(), (2 * (q - p))[0, 1].detach())
    assert not gradient[0, 0].any()


def test_label_divergence_counts_what_is_no_label_as_one_outcome() -> None:
    student = nn.functional.log_softmax(torch.tensor([[1.0, 2.0, 0.5, -1.0]]), -1)
    expert = nn.functional.log_softmax(torch.tensor([[0.3, 0.1, 2.0, 1.0]]), -1)
    found = label_divergence(student[:, :2], expert[:, :2])
    three = [torch.stack([logs[0, 0], logs[0, 1], logs[0, 2:].logsumexp(-1)]) for logs in (student, expert)]
    assert_near(found[0], (three[1].exp() * (three[1] - three[0])).sum())
    certain = torch.tensor([[0.0, -30.0]])
    assert bool(label_divergence(certain.requires_grad_(), expert[:, :2]).isfinite().all())
