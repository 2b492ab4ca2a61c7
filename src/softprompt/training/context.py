"""The context of a distillation: the text that an experiment names, and the teacher that reads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from softprompt.backbones import Backbone
from softprompt.config import Experiment
from softprompt.evaluation.predict import answer_limit
from softprompt.models import attach, model_class
from softprompt.models.teacher import Teacher
from softprompt.runs import Run
from softprompt.tasks import Task
from softprompt.tasks.data.chat import check_context_layout, encode_system_message
from softprompt.tasks.data.context import SEPARATOR, encode_context
from softprompt.tasks.data.examples import Example


def read_context(experiment: Experiment, demonstrations: str = "") -> str:
    """The text to distil: that of the file `context`, the demonstrations, or both; empty if there is neither.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text, or has no text.
    """
    texts = [demonstrations] if demonstrations else []
    if experiment.context is not None:
        if not Path(experiment.context).is_file():
            raise FileNotFoundError(
                f"there is no file {experiment.context}; give the path of a text file as the context"
            )
        try:
            text = Path(experiment.context).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{experiment.context} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        if not text:
            raise ValueError(f"{experiment.context} has no text; give a context that says something")
        texts.insert(0, text)
    return SEPARATOR.join(texts)


def teacher_of(run: Run, backbone: Backbone) -> Teacher | None:
    """The teacher of a distilled run; None if the run is not a distillation.

    Raises:
        ValueError: as `Run.context` and `make_teacher` raise.
    """
    if not (context := run.context):
        return None
    return make_teacher(context, backbone, run.task, run.experiment.training.max_new_tokens)


def make_teacher(context: str, backbone: Backbone, task: Task, max_new_tokens: int) -> Teacher:
    """The frozen model with `context` in front of each row; in a chat task, as the system message.

    Raises:
        ValueError: a backbone that does not answer in words; a context of control tokens only, or one that leaves no
            position for a row; in a chat task, a backbone without a chat template that writes system messages.
    """
    if model_class(backbone).needs_head(backbone):
        raise ValueError(
            f"{backbone.source} does not answer in words, so it cannot be a teacher; use a decoder, "
            "an encoder-decoder or a masked language model"
        )
    model, tokenizer = attach(backbone), backbone.tokenizer
    names = sorted((token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len)
    text = context
    for name in reversed(names):  # the longest first, as one name may be part of another
        text = text.replace(name, "")
    if not text.strip():
        raise ValueError(
            f"the context {context[:60]!r} consists of control tokens of {backbone.source}; give a text that says "
            "something"
        )
    if task.messages:
        ids, leading, trailing, replaced = encode_system_message(tokenizer, context)
        teacher = Teacher(model, ids, leading, trailing, replaced)
    else:
        ids, leading = encode_context(tokenizer, context)
        teacher = Teacher(model, ids, leading)
    longest = answer_limit(task, tokenizer, max_new_tokens)
    if (room := _room_after(teacher, longest)) is not None and room < 1:
        raise ValueError(
            f"the context has {len(ids)} tokens and an answer up to {longest}, which leaves a row none of the "
            f"{model.max_row} positions of {backbone.source}; shorten the context, or lower max_new_tokens"
        )
    return teacher


def _room_after(teacher: Teacher, answer_length: int) -> int | None:
    """The tokens that a row may have after the teacher's context, so that its answer fits too; None: any number."""
    model = teacher.model
    if model.max_row is None:
        return None
    return model.max_row - len(teacher.context) - (answer_length if model.answer_in_sequence else 0)


def check_after_context(
    teacher: Teacher,
    context: str,
    task: Task,
    rows: Dataset | Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    split: str,
    max_new_tokens: int,
) -> None:
    """Check that rows and their answers fit after the context too, and in a chat that their tokens stay the same.

    The answers are a row's own, and the longest that the teacher writes or scores at the end of the training.

    Args:
        rows: what `examples` are made of.
        split: their name in errors.

    Raises:
        ValueError: a row that does not fit, or as `check_context_layout` raises.
    """
    if task.messages:
        check_context_layout(task, teacher.backbone.tokenizer, rows, examples, context)
    longest = answer_limit(task, teacher.backbone.tokenizer, max_new_tokens)
    for example in examples:
        room = _room_after(teacher, max(longest, len(example.answer_ids)))
        if room is not None and len(example.input_ids) > room:
            raise ValueError(
                f"{example.where} ({split}) has {len(example.input_ids)} tokens, and the context of "
                f"{len(teacher.context)} tokens and its longest answer leave it {max(room, 0)} of the "
                f"{teacher.model.max_row} positions of {teacher.backbone.source}; shorten the context, lower "
                "max_input_tokens or max_new_tokens, or leave the row out"
            )
