"""Rows in, answers out."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.config import TrainingConfig
from softprompt.evaluation import prefix_sharing
from softprompt.models import Prepared, PromptedModel
from softprompt.runs import Run, resolve_run
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


def predict(run: Run | str | Path, rows: Any, *, backbone: Backbone | str | None = None) -> list[Answer]:
    """The run's answers to `rows`, which need the template's columns and no label.

    Args:
        run: a run, or its folder.
        rows: a list of rows (each a mapping of columns), a table (`datasets.Dataset`, pandas or polars data frame), or
            one row; where the template reads one column also a list of its texts, or one text. An image is its path,
            or its bytes as `datasets` has them.
        backbone: the run's own, loaded or as `load_backbone` takes it; none: where the run had it.

    Raises:
        ValueError: `rows` is none of these, a row lacks a column, or the run is not finished.
    """
    run = resolve_run(run)
    table = _table(run.task, rows)
    if not table:
        return []
    backbone = run.backbone(backbone)
    prompted = run.prompted(backbone)
    limit = input_limit(prompted, run.task, run.experiment.training)
    examples = encode(run.task, backbone.tokenizer, table, limit, closing=prompted.appends_eos, answers=False)[0]
    for example in examples:
        prompted.check_row(example.input_ids, (), example.where)
    return answer(prompted, run.task, examples, max_new_tokens=run.experiment.training.max_new_tokens)


def _table(task: Task, given: Any) -> list[Mapping[str, Any]]:
    """Rows of whatever holds rows."""
    if isinstance(given, str | Mapping):
        given = [given]
    elif callable(getattr(given, "to_dicts", None)):  # polars
        given = given.to_dicts()
    elif callable(getattr(given, "to_dict", None)) and hasattr(
        given, "columns"
    ):  # pandas, whose gaps are of many kinds
        given = given.astype(object).where(given.notna(), None).to_dict("records")
    if isinstance(given, bytes | Path) or not isinstance(given, Iterable):
        raise ValueError(f"the rows are {_shown(given)}; {_wanted(task)}")
    return [_row(task, one, f"row {number}") for number, one in enumerate(given, start=1)]


def _row(task: Task, given: Any, where: str) -> Mapping[str, Any]:
    is_cell = isinstance(given, Mapping) and bool(task.image) and task.image not in given and "bytes" in given
    if isinstance(given, Mapping) and not is_cell:
        return given
    if not is_cell and not isinstance(given, str | Path if task.image else str):
        raise ValueError(f"{where} is {_shown(given)}; {_wanted(task)}")
    if len(task.inputs) != 1:
        raise ValueError(f"{where} is one text, and task {task.name!r} reads several columns; {_wanted(task)}")
    if not task.image and _is_file(given):
        raise ValueError(
            f"{where}, {given!r}, is the name of a file; give its rows (softprompt.tasks.read_rows), or if it is the "
            f"text that is meant {{{task.inputs[0]!r}: {given!r}}}"
        )
    return {task.inputs[0]: str(given) if isinstance(given, Path) else given}


def _wanted(task: Task) -> str:
    columns = ", ".join(map(repr, task.inputs))
    several = len(task.inputs) > 1
    texts = "" if several else f", or a list of {'images' if task.image else 'texts'}"
    return f"give a list of rows, each a dict with the column{'s' if several else ''} {columns}, or a data frame{texts}"


def _shown(given: Any) -> str:
    """A wrong value, short."""
    text = repr(given)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(given).__name__})"


def _is_file(text: str) -> bool:
    """Whether a text is the name of a file that is there, which is hardly the text that is meant."""
    try:
        return len(text) < 4096 and Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a zero in it
        return False


@torch.no_grad()
def answer(
    prompted: PromptedModel, task: Task, examples: Sequence[Example], *, batch_size: int = 32, max_new_tokens: int
) -> list[Answer]:
    """An answer an example, in their order.

    The prompt's share is computed once, and where the model allows it what texts begin with alike is once too; rows of
    like length run together.
    """
    prepared = prompted.prepare([] if prompted.prompt is None else [prompted.prompt])
    texts = [example.input_ids for example in examples]
    if prompted.supports_prefix_sharing and (shared := prefix_sharing.common(texts)):
        prepared = prompted.with_shared_prefix(prepared, [shared])
        texts = [text[len(shared) :] for text in texts]
    answers: dict[int, Answer] = {}
    for reading in prefix_sharing.plan_prefix_groups(texts, batch_size, share=prompted.supports_prefix_sharing):
        ready = prompted.with_shared_prefix(prepared, reading.beginnings) if any(reading.beginnings) else prepared
        for start in range(0, len(reading.texts), batch_size):
            part = reading.texts[start : start + batch_size]
            which = torch.tensor([beginning for _, beginning in part], device=prompted.backbone.device)
            rows = [
                dataclasses.replace(examples[place], input_ids=texts[place][len(reading.beginnings[beginning]) :])
                for place, beginning in part
            ]
            if task.is_classification:
                found = _classify(prompted, ready, task, rows, which)
            else:
                found = _generate(prompted, ready, rows, which, max_new_tokens)
            answers.update(zip([place for place, _ in part], found, strict=True))
    return [answers[place] for place in range(len(examples))]


def input_limit(prompted: PromptedModel, task: Task, training: TrainingConfig) -> int:
    """Most tokens of an input: what was asked for, else what the task says, else 512; never more than fit.

    Of an image it is its side in pixels: what was asked for, else what the backbone was made for.

    Raises:
        ValueError: prompt and answer alone fill the backbone's positions, or the answer those that the prompt knows.
    """
    if task.image:
        return training.image_size or int(prompted.backbone.tokenizer.size)
    limit = training.max_input_tokens or task.max_input_tokens or 512
    words = answer_ids(task, prompted.backbone.tokenizer) if task.is_classification else ()
    longest = max(map(len, words), default=training.max_new_tokens)
    if prompted.prompt is not None and (max_input_length := prompted.prompt.max_input_length) is not None:
        left = max_input_length - longest if prompted.answer_in_sequence else max_input_length
        if left < 1:
            raise ValueError(
                f"the prompt has offsets for {max_input_length} tokens, of which an answer of {longest} leaves none "
                "to the input; give it more positions, or lower max_new_tokens"
            )
        limit = min(limit, left)
    prompted.refuse_long_answer(longest)
    most = prompted.max_row
    if most is None:
        return limit
    length, longest = prompted.prompt_length, longest if prompted.answer_in_sequence else 0
    if length + longest >= most:
        raise ValueError(
            f"a prompt of {length} and an answer of {longest} tokens leave no room in the {most} positions of "
            f"{prompted.backbone.source}; lower the length or max_new_tokens"
        )
    return min(limit, most - length - longest)


def over_long_answers(examples: Sequence[Example], max_new_tokens: int) -> int:
    """How many examples have a text to answer, its end not counted, that `max_new_tokens` cannot hold: never right."""
    return sum(example.label is None and len(example.answer_ids) - 1 > max_new_tokens for example in examples)


def over_long_note(examples: Sequence[Example], max_new_tokens: int, split: str) -> str | None:
    """What to say of them before a training; none where there are none."""
    count = over_long_answers(examples, max_new_tokens)
    if not count:
        return None
    longest = max(len(example.answer_ids) - 1 for example in examples if example.label is None)
    return (
        f"{count} of {len(examples)} {split} answers are longer than {max_new_tokens} tokens, which is all that is "
        f"generated, so they can never be right; give --max-new-tokens {longest}"
    )


def _classify(
    prompted: PromptedModel, prepared: Prepared, task: Task, part: Sequence[Example], which: Tensor
) -> list[Answer]:
    tokenizer, device = prompted.backbone.tokenizer, prompted.backbone.device
    inputs = collate(part, pad_id=pad_id(prompted.backbone), side="left", with_answers=False)
    scores = prompted.score(*inputs.inputs(device), answer_ids(task, tokenizer), prepared, which)
    labels, words = list(task.label_words), list(task.label_words.values())
    result = []
    for example, probs in zip(part, scores.softmax(-1).tolist(), strict=True):
        index = max(range(len(probs)), key=probs.__getitem__)
        result.append(
            Answer(
                row=example.row,
                text=words[index],
                label=labels[index],
                index=index,
                probabilities=dict(zip(labels, probs, strict=True)),
            )
        )
    return result


def _generate(
    prompted: PromptedModel, prepared: Prepared, part: Sequence[Example], which: Tensor, max_new_tokens: int
) -> list[Answer]:
    tokenizer, device = prompted.backbone.tokenizer, prompted.backbone.device
    inputs = collate(part, pad_id=pad_id(prompted.backbone), side="left", with_answers=False)
    ids, mask = inputs.input_ids.to(device), inputs.attention_mask.to(device)
    steps = prompted.generate(ids, mask, max_new_tokens=max_new_tokens, prompts=prepared, index=which)
    tokens = torch.stack(list(steps), 1).tolist()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [Answer(row=example.row, text=text.strip()) for example, text in zip(part, texts, strict=True)]


def pad_id(backbone: Backbone) -> int:
    """The id that fills short rows: the mask hides it, but the model must have an embedding for it."""
    if backbone.architecture == "vision":
        return 0
    found = (getattr(backbone.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(one) for one in found if one is not None and 0 <= one < backbone.vocab_size), 0)
