"""Predict answers for rows."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.config import TrainingConfig
from softprompt.evaluation import prefix_sharing
from softprompt.models import PreparedPrompts, PromptedModel
from softprompt.models.sampling import before_end
from softprompt.runs import PeftPrompt, Run, check_has_own_task, resolve_prompt
from softprompt.tasks import Task
from softprompt.tasks.data.collate import collate
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.tokenize import answer_ids, encode
from softprompt.types import DecodeWeights, TruncationWarning


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's answer to one row."""

    row: int
    """The row's index in the input, from 0."""
    text: str
    """The label word, or the generated text."""
    label: str = ""
    """The label, in classification."""
    index: int = -1
    """The class index, in classification; -1 if a generated text begins with no label word."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """The probability of each label among the task's labels, so that they sum to 1; empty for a generated answer."""


def predict(
    run: Run | PeftPrompt | str | Path,
    rows: Any,
    *,
    task: str | None = None,
    backbone: Backbone | str | None = None,
    decode_weights: DecodeWeights = "auto",
) -> list[Answer]:
    """The run's answers to `rows`, which need the template's columns but no label.

    Args:
        run: a run, its folder, or a stock PEFT prompt folder.
        rows: a list of rows (each a mapping of columns), a table (`datasets.Dataset`, pandas or polars data frame), or
            one row. If the template reads one column, also a list of texts or one text. An image is its path, or its
            bytes in the form of `datasets`.
        task: a built-in task's name or a TOML file, for a PEFT folder; a run has its own.
        backbone: the run's backbone, loaded or as a source for `load_backbone`; None to load it from where the run
            recorded it.
        decode_weights: the weights that generation reads, as `Backbone.with_decode_weights`; `auto` leaves them to the
            backbone.

    Raises:
        FileNotFoundError: there is no such run, or its backbone cannot be found.
        ValueError: `rows` is not one of these, a row lacks a column or has no text, the run is not finished, `task` is
            missing or given to a run, or `decode_weights` does not fit the backbone or a task with labels.

    Warns:
        TruncationWarning: rows were cut to the input's limit, as in training; it has their number.
    """
    run = resolve_prompt(run, task)
    check_has_own_task(run, task)
    check_generates(run.task, decode_weights)
    table = _table(run.task, rows)
    if not table:
        return []
    for number, row in enumerate(table, start=1):
        run.task.check_input(row, f"row {number}")
    backbone = run.load_backbone(backbone)
    if decode_weights != "auto":
        backbone = backbone.with_decode_weights(decode_weights)
    prompted = run.prompted(backbone)
    examples = encode_rows(prompted, run.task, table, run.experiment.training, answers=False)
    return answer(prompted, run.task, examples, max_new_tokens=run.experiment.training.max_new_tokens)


def encode_rows(
    prompted: PromptedModel,
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    training: TrainingConfig,
    *,
    answers: bool = True,
) -> Sequence[Example]:
    """Tokenize rows to be scored or answered, as the training that has these settings did, and check that they fit.

    Args:
        answers: read the answers; False: rows need not have any.

    Raises:
        ValueError: a row, or a label word, that the model cannot run.

    Warns:
        TruncationWarning: rows were cut to the input's limit; it has their number.
    """
    tokenizer, limit = prompted.backbone.tokenizer, input_limit(prompted, task, training)
    if task.is_classification:
        prompted.check_candidates(task.answers, answer_ids(task, tokenizer))
    examples, shortened = encode(task, tokenizer, rows, limit, appends_eos=prompted.appends_eos, answers=answers)
    for example in examples:  # an answer is compared as text, so its tokens need not fit
        prompted.check_row(example.input_ids, (), example.where)
    if shortened:
        text = f"{shortened} of {len(examples)} rows were cut to {limit} tokens, as in training"
        warnings.warn(text, TruncationWarning, stacklevel=3)
    return examples


def check_generates(task: Task, decode_weights: DecodeWeights) -> None:
    """Refuse `decode_weights` for a task whose answers are not generated."""
    if decode_weights != "auto" and task.is_classification:
        raise ValueError(
            f"decode_weights is {decode_weights!r}, but task {task.name!r} has labels, which are not decoded; "
            "leave it out"
        )


def _table(task: Task, rows: Any) -> list[Mapping[str, Any]]:
    """The rows of any of the types that `predict` accepts."""
    if isinstance(rows, str | Mapping):
        rows = [rows]
    elif callable(getattr(rows, "to_dicts", None)):  # polars
        rows = rows.to_dicts()
    elif callable(getattr(rows, "to_dict", None)) and hasattr(rows, "columns"):  # pandas
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")  # NaN, NaT and NA become None
    if isinstance(rows, bytes | Path) or not isinstance(rows, Iterable):
        raise ValueError(f"the rows are {_describe(rows)}; {_accepted_rows(task)}")
    return [_row(task, row, f"row {number}") for number, row in enumerate(rows, start=1)]


def _row(task: Task, row: Any, where: str) -> Mapping[str, Any]:
    is_image_cell = isinstance(row, Mapping) and bool(task.image) and task.image not in row and "bytes" in row
    if isinstance(row, Mapping) and not is_image_cell:
        return row
    if not is_image_cell and not isinstance(row, str | Path if task.image else str):
        raise ValueError(f"{where} is {_describe(row)}; {_accepted_rows(task)}")
    if len(task.inputs) != 1:
        raise ValueError(f"{where} is one text, but task {task.name!r} reads several columns; {_accepted_rows(task)}")
    if not task.image and _is_file(row):
        raise ValueError(
            f"{where}, {row!r}, is the name of a file; give its rows (softprompt.tasks.read_rows), or if it is the "
            f"text that is meant {{{task.inputs[0]!r}: {row!r}}}"
        )
    return {task.inputs[0]: str(row) if isinstance(row, Path) else row}


def _accepted_rows(task: Task) -> str:
    columns = ", ".join(map(repr, task.inputs))
    several = len(task.inputs) > 1
    texts = "" if several else f", or a list of {'images' if task.image else 'texts'}"
    return f"give a list of rows, each a dict with the column{'s' if several else ''} {columns}, or a data frame{texts}"


def _describe(value: Any) -> str:
    """A value and its type, truncated for an error message."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _is_file(text: str) -> bool:
    """Whether a text is the name of an existing file, and so probably not meant as a text."""
    try:
        return len(text) < 4096 and Path(text).is_file()
    except (OSError, ValueError):  # too long for a file name, or contains a null byte
        return False


_OVERFLOW = -1
"""Ends the answer of a row whose logits are not finite."""


@torch.no_grad()
def answer(
    prompted: PromptedModel,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    max_new_tokens: int,
    generate: bool = False,
) -> list[Answer]:
    """One answer per example, in order.

    With `generate`, classification is not a choice among the label words either: the model generates as many tokens as
    the longest of them has, and an answer that begins with none of them keeps the index -1.

    The prompt is computed once, and so is any prefix that examples share if the model supports it. Examples of similar
    length are batched together.
    """
    prepared = prompted.prepare([] if prompted.prompt is None else [prompted.prompt])
    texts = [example.input_ids for example in examples]
    if prompted.supports_prefix_sharing and (prefix := prefix_sharing.shared_prefix(texts)):
        prepared = prompted.with_shared_prefix(prepared, [prefix])
        texts = [text[len(prefix) :] for text in texts]
    answers: dict[int, Answer] = {}
    for group in prefix_sharing.plan_prefix_groups(texts, batch_size, share=prompted.supports_prefix_sharing):
        with_prefixes = prompted.with_shared_prefix(prepared, group.prefixes) if any(group.prefixes) else prepared
        for start in range(0, len(group.texts), batch_size):
            batch = group.texts[start : start + batch_size]
            index = torch.tensor([prefix for _, prefix in batch], device=prompted.backbone.device)
            rows = [
                dataclasses.replace(examples[row], input_ids=texts[row][len(group.prefixes[prefix]) :])
                for row, prefix in batch
            ]
            if task.is_classification and not generate:
                batch_answers = _classify(prompted, with_prefixes, task, rows, index)
            else:
                batch_answers = _generate(prompted, with_prefixes, task, rows, index, max_new_tokens)
            answers.update(zip([row for row, _ in batch], batch_answers, strict=True))
    return [answers[row] for row in range(len(examples))]


def input_limit(prompted: PromptedModel, task: Task, training: TrainingConfig) -> int:
    """The most tokens that an input may have, so that prompt and answer fit too; for images, the side in pixels.

    The limit is `max_input_tokens` of the training, else of the task, else 512; or less where prompt and answer need
    the positions. For images, it is `image_size` of the training, else the backbone's default.

    Raises:
        ValueError: prompt and answer leave the input no position of the backbone, or the answer none of the prompt's.
    """
    if task.image:
        return training.image_size or int(prompted.backbone.tokenizer.size)
    limit = training.max_input_tokens or task.max_input_tokens or 512
    longest_answer = answer_limit(task, prompted.backbone.tokenizer, training.max_new_tokens)
    if prompted.prompt is not None and (max_input_length := prompted.prompt.max_input_length) is not None:
        input_length = max_input_length - longest_answer if prompted.answer_in_sequence else max_input_length
        if input_length < 1:
            raise ValueError(
                f"the prompt has offsets for {max_input_length} tokens, of which an answer of {longest_answer} leaves "
                "none to the input; give it more positions, or lower max_new_tokens"
            )
        limit = min(limit, input_length)
    prompted.check_answer_length(longest_answer)
    max_row = prompted.max_row
    if max_row is None:
        return limit
    prompt_length, answer_length = prompted.prompt_length, longest_answer if prompted.answer_in_sequence else 0
    if prompt_length + answer_length >= max_row:
        raise ValueError(
            f"a prompt of {prompt_length} and an answer of {answer_length} tokens leave no room in the {max_row} "
            f"positions of {prompted.backbone.source}; lower the length or max_new_tokens"
        )
    return min(limit, max_row - prompt_length - answer_length)


def answer_limit(task: Task, tokenizer: Any, max_new_tokens: int) -> int:
    """The most tokens that an answer may have: those of the longest label word, else `max_new_tokens`."""
    candidates = answer_ids(task, tokenizer) if task.is_classification else ()
    return max(map(len, candidates), default=max_new_tokens)


def over_long_answers(examples: Sequence[Example], max_new_tokens: int) -> int:
    """The number of examples whose gold text, without its end token, exceeds `max_new_tokens`: they cannot be right."""
    return sum(example.label is None and len(example.answer_ids) - 1 > max_new_tokens for example in examples)


def over_long_note(examples: Sequence[Example], max_new_tokens: int, split: str) -> str | None:
    """The warning about `over_long_answers` before a training; None if there are none."""
    count = over_long_answers(examples, max_new_tokens)
    if not count:
        return None
    longest = max(len(example.answer_ids) - 1 for example in examples if example.label is None)
    return (
        f"{count} of {len(examples)} {split} answers are longer than {max_new_tokens} tokens, the most that are "
        f"generated, so they can never be right; give --max-new-tokens {longest}"
    )


def _classify(
    prompted: PromptedModel, prepared: PreparedPrompts, task: Task, batch: Sequence[Example], index: Tensor
) -> list[Answer]:
    tokenizer, device = prompted.backbone.tokenizer, prompted.backbone.device
    inputs = collate(batch, pad_id=pad_id(prompted.backbone), side="left", with_answers=False)
    scores = prompted.score(*inputs.inputs(device), answer_ids(task, tokenizer), prepared, index)
    labels, label_words = list(task.label_words), list(task.label_words.values())
    answers = []
    for example, probs in zip(batch, scores.softmax(-1).tolist(), strict=True):
        if any(map(math.isnan, probs)):
            raise _overflow_error(prompted, example)
        best = max(range(len(probs)), key=probs.__getitem__)
        answers.append(
            Answer(
                row=example.row,
                text=label_words[best],
                label=labels[best],
                index=best,
                probabilities=dict(zip(labels, probs, strict=True)),
            )
        )
    return answers


def _generate(
    prompted: PromptedModel,
    prepared: PreparedPrompts,
    task: Task,
    batch: Sequence[Example],
    index: Tensor,
    max_new_tokens: int,
) -> list[Answer]:
    tokenizer, device = prompted.backbone.tokenizer, prompted.backbone.device
    inputs = collate(batch, pad_id=pad_id(prompted.backbone), side="left", with_answers=False)
    ids, mask = inputs.input_ids.to(device), inputs.attention_mask.to(device)
    candidates = answer_ids(task, tokenizer) if task.is_classification else ()
    length = max(map(len, candidates), default=max_new_tokens)
    ends = prompted.end_of_sequence()
    stop = (_OVERFLOW, *ends)
    steps = prompted.generate(ids, mask, max_new_tokens=length, stop=stop, prompts=prepared, index=index)
    tokens = torch.stack(list(steps), 1).tolist()
    if overflown := [example for example, row in zip(batch, tokens, strict=True) if _OVERFLOW in row]:
        raise _overflow_error(prompted, overflown[0])
    texts = tokenizer.batch_decode([before_end(row, ends) for row in tokens], skip_special_tokens=True)
    labels = list(task.label_words)
    answers = []
    for example, row, text in zip(batch, tokens, texts, strict=True):
        # No label word is the beginning of another, so at most one matches.
        match = next((i for i, label_word in enumerate(candidates) if row[: len(label_word)] == list(label_word)), -1)
        answers.append(
            Answer(row=example.row, text=text.strip(), label=labels[match] if match >= 0 else "", index=match)
        )
    return answers


def _overflow_error(prompted: PromptedModel, example: Example) -> ValueError:
    return ValueError(
        f"{example.where or f'row {example.row + 1}'} overflows in {prompted.backbone.precision}, so it has no answer; "
        "use another dtype, or train the prompt again"
    )


def pad_id(backbone: Backbone) -> int:
    """The padding id; the attention mask excludes it, but the model must have an embedding for it."""
    ids = (getattr(backbone.tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((int(token) for token in ids if token is not None and 0 <= token < backbone.vocab_size), 0)
