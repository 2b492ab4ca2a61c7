"""Rows in, answers out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

from softprompt.attach import Attachment, Prepared
from softprompt.backbone import Backbone, load
from softprompt.experiment import Training
from softprompt.runs import Run
from softprompt.tasks import Example, Task, answer_ids, collate, encode


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says of one row."""

    row: int
    """The row's place in what was given, from 0."""
    text: str
    """The label's word, or the generated text."""
    label: str = ""
    """The label, in a classification."""
    index: int = -1
    """The class, in a classification."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Of each label among the task's labels, in a classification."""


def predict(run: Run, rows: Sequence[Mapping[str, Any]], *, backbone: Backbone | None = None) -> list[Answer]:
    """The run's answers to `rows`, which need the template's columns and no label.

    Args:
        backbone: the run's own, if it is loaded already; else it is loaded as in training.

    Raises:
        ValueError: a row lacks a column, or the run is not finished.
    """
    backbone = backbone or load(run.experiment.backbone, dtype=run.experiment.backbone_dtype)
    attachment = run.attachment(backbone)
    limit = input_limit(attachment, run.task, run.experiment.training)
    examples = encode(run.task, backbone.tokenizer, rows, limit, closing=attachment.closed, answers=False)[0]
    return answer(attachment, run.task, examples, max_new_tokens=run.experiment.training.max_new_tokens)


@torch.no_grad()
def answer(
    attachment: Attachment, task: Task, examples: Sequence[Example], *, batch: int = 32, max_new_tokens: int
) -> list[Answer]:
    """An answer an example, in their order; the prompt's share is computed once, rows of like length run together."""
    prepared = attachment.prepare([] if attachment.prompt is None else [attachment.prompt])
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        part = [examples[place] for place in places]
        if task.is_classification:
            found = _classify(attachment, prepared, task, part)
        else:
            found = _generate(attachment, prepared, part, max_new_tokens)
        answers.update(zip(places, found, strict=True))
    return [answers[place] for place in range(len(examples))]


def input_limit(attachment: Attachment, task: Task, training: Training) -> int:
    """Most tokens of an input: what was asked for, else what the task says, else 512; never more than fit.

    Of an image it is its side in pixels: what was asked for, else what the backbone was made for.

    Raises:
        ValueError: prompt and answer alone fill the backbone's positions, or the answer those that the prompt knows.
    """
    if task.image:
        return training.image_size or int(attachment.backbone.tokenizer.size)
    limit = training.max_tokens or task.max_tokens or 512
    words = answer_ids(task, attachment.backbone.tokenizer) if task.is_classification else ()
    longest = max(map(len, words), default=training.max_new_tokens)
    if attachment.prompt is not None and (reach := attachment.prompt.reach) is not None:
        left = reach - longest if attachment.within else reach
        if left < 1:
            raise ValueError(
                f"the prompt has offsets for {reach} tokens, of which an answer of {longest} leaves none to the input; "
                "give it more positions, or lower max_new_tokens"
            )
        limit = min(limit, left)
    most = attachment.backbone.max_positions
    if most is None:
        return limit
    length = 0 if attachment.prompt is None else len(attachment.prompt.prompt())
    if length + longest >= most:
        raise ValueError(
            f"a prompt of {length} and an answer of {longest} tokens leave no room in the {most} positions of "
            f"{attachment.backbone.source}; lower the length or max_new_tokens"
        )
    return min(limit, most - length - longest)


def _classify(attachment: Attachment, prepared: Prepared, task: Task, part: Sequence[Example]) -> list[Answer]:
    tokenizer, device = attachment.backbone.tokenizer, attachment.backbone.device
    inputs = collate(part, pad_id=pad_id(tokenizer), side="left", with_answers=False)
    scores = attachment.score(*inputs.inputs(device), answer_ids(task, tokenizer), prompts=prepared)
    labels, words = list(task.words), list(task.words.values())
    result = []
    for example, chances in zip(part, scores.softmax(-1).tolist(), strict=True):
        index = max(range(len(chances)), key=chances.__getitem__)
        result.append(
            Answer(
                row=example.row,
                text=words[index],
                label=labels[index],
                index=index,
                probabilities=dict(zip(labels, chances, strict=True)),
            )
        )
    return result


def _generate(attachment: Attachment, prepared: Prepared, part: Sequence[Example], max_new_tokens: int) -> list[Answer]:
    tokenizer, device = attachment.backbone.tokenizer, attachment.backbone.device
    inputs = collate(part, pad_id=pad_id(tokenizer), side="left", with_answers=False)
    steps = attachment.generate(
        inputs.input_ids.to(device), inputs.attention_mask.to(device), max_new_tokens=max_new_tokens, prompts=prepared
    )
    tokens = torch.stack(list(steps), 1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Answer(row=example.row, text=text.strip()) for example, text in zip(part, texts, strict=True)]


def pad_id(tokenizer: Any) -> int:
    """The id that fills short rows; any will do, since the mask hides it."""
    found = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(one) for one in found if one is not None), 0)
