"""What a client sends, as tokens: refused here, before it meets other rows in a batch."""

import base64
import io
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jaxtyping import Float
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.image_processor import Picture
from softprompt.models.base import refuse_unknown as refuse_unknown_tokens
from softprompt.models.verify import sliding_window
from softprompt.serve.engine.request import ClassifyParams, EngineRequest
from softprompt.serve.prompts.entry import PromptEntry, called, needs_head
from softprompt.tasks import Task, answer_ids
from softprompt.tasks import beginning as task_beginning
from softprompt.tasks import encode as encode_rows

_tokenizing = threading.Lock()
"""A fast tokenizer keeps settings between calls and is not for several threads at once."""
_PLAIN = Task(name="text", template="{text}", target="answer", metrics=("exact_match",))
_NO_LIMIT = 1_000_000_000
_MAX_PIXELS = 40_000_000
"""Of an image that is sent: a small file may unfold to any size."""
_BEGINNING = 16
"""Least tokens of a template's beginning that are worth keys and values of their own, beside the prompt's."""
_MAX_LABEL = 32
"""Tokens of a label that a request brings: each costs a row of the vocabulary's logits for every row and label."""


def choices(
    backbone: Backbone,
    served: PromptEntry,
    rows: Sequence[str | Mapping[str, Any]],
    labels: Sequence[str] | None,
    max_input_tokens: int,
) -> list[tuple[tuple[int, ...], ClassifyParams]]:
    """Each row's tokens and candidates; a row of a task is shortened as in training, any other is refused if too long.

    Raises:
        ValueError: rows that lack a column, are too long or have no token; labels that are missing or cannot be.
    """
    if not rows:
        raise ValueError("there are no rows; give at least one")
    if backbone.architecture == "vision":
        raise ValueError(f"{called(backbone)} reads images, and prompt {served.name!r} has no task of such")
    if served.task is None or labels is not None:
        return _with_labels(backbone, served, rows, labels, max_input_tokens)
    if not served.classifies:
        raise ValueError(f"prompt {served.name!r} writes texts; ask for a completion, or give labels")
    limit = min(served.max_input_tokens or max_input_tokens, max_input_tokens)
    with _tokenizing:
        found = encode_rows(
            served.task,
            backbone.tokenizer,
            [row_of(served, row) for row in rows],
            limit,
            closing=backbone.architecture != "causal",
            answers=False,
        )[0]
    return [(_some(example.input_ids), ClassifyParams(candidates=served.candidates)) for example in found]


def beginning(backbone: Backbone, served: PromptEntry) -> tuple[int, ...]:
    """The tokens that rows of the prompt's task begin with, where reading them when the prompt comes pays."""
    if served.task is None or sliding_window(backbone) is not None:  # in a window they would stand in others' way
        return ()
    with _tokenizing:
        found = task_beginning(served.task, backbone.tokenizer)
    return found if _BEGINNING <= len(found) < (served.max_input_tokens or 0) else ()


def own_choice(served: PromptEntry, labels: Sequence[str] | None) -> ClassifyParams:
    """The prompt's own labels.

    Raises:
        ValueError: others are asked for, which its head does not know.
    """
    if labels is not None:
        raise ValueError(f"prompt {served.name!r} answers through a head for its own labels; leave labels out")
    return ClassifyParams(candidates=served.candidates)


def images(
    backbone: Backbone, served: PromptEntry, rows: Sequence[str | Mapping[str, Any]]
) -> list[Float[Tensor, "channel height width"]]:
    """Each row's image as the backbone sees it.

    Raises:
        ValueError: no rows, or an image that cannot be read or is too large.
    """
    if not rows:
        raise ValueError("there are no rows; give at least one")
    assert served.task is not None
    column, size = served.task.image, served.max_input_tokens or int(backbone.tokenizer.size)
    found = []
    for number, row in enumerate(rows, start=1):
        cell = row if isinstance(row, str | bytes) else row.get(column)
        content = _image_bytes(cell, f"row {number}", column)
        found.append(Picture({"bytes": content}, backbone.tokenizer, size, f"row {number}").pixels())
    return found


def _image_bytes(cell: Any, where: str, column: str) -> bytes:
    """An image's file as it was sent; what names a file of this machine is refused."""
    if isinstance(cell, str):
        try:
            cell = base64.b64decode(re.sub(r"^data:image/[a-z.+-]+;base64,", "", cell), validate=True)
        except ValueError:
            cell = None
    if not isinstance(cell, bytes) or not cell:
        raise ValueError(f"{where} has no image in {column!r}; send its file's bytes in base64")
    from PIL import Image

    with suppress(OSError), Image.open(io.BytesIO(cell)) as image:  # what is no image is refused when it is read
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(
                f"{where} has an image of {image.width} x {image.height}; send at most {_MAX_PIXELS} pixels"
            )
    return cell


def text(
    backbone: Backbone,
    served: PromptEntry,
    given: str | Mapping[str, Any] | Sequence[int],
    max_new_tokens: int,
    max_input_tokens: int,
) -> tuple[int, ...]:
    """The tokens to write behind.

    Raises:
        ValueError: an encoder, ids that the vocabulary does not have, no token, or no room for the answer.
    """
    if backbone.architecture in ("encoder", "vision"):
        raise ValueError(f"{called(backbone)} ({backbone.architecture}) writes no text; classify instead")
    if isinstance(given, str):
        ids = _tokens(backbone, _PLAIN, {"text": given})
    elif isinstance(given, Mapping):
        if served.task is None:
            raise ValueError(f"prompt {served.name!r} has no template for a row; give the text itself")
        with _tokenizing:
            limit = min(served.max_input_tokens or max_input_tokens, max_input_tokens)
            ids = encode_rows(
                served.task,
                backbone.tokenizer,
                [dict(given)],
                limit,
                closing=backbone.architecture != "causal",
                answers=False,
            )[0][0].input_ids
    else:
        ids = tuple(given)
        size = backbone.vocab_size
        if wrong := [one for one in ids if not 0 <= one < size]:
            raise ValueError(f"token {wrong[0]} is not in the vocabulary of {size}; send ids from 0 to {size - 1}")
    ids = _some(ids)
    _refuse_beyond(len(ids), max_input_tokens)
    refuse_long(backbone, served, len(ids), max_new_tokens)
    return ids


def chat(backbone: Backbone, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """The tokens of a conversation, as the tokenizer's chat template writes it.

    Control tokens are those that the template writes; in a message their names are text.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation.
    """
    tokenizer = backbone.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{called(backbone)} has no chat template; ask for a completion")
    with _tokenizing:
        try:
            made = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, sanitize_control_tokens=True, return_dict=True
            )
        except ImportError:
            raise
        except Exception as error:  # a template is a program of the model's author, and raises what it likes
            raise ValueError(f"the chat template of {called(backbone)} refuses the messages: {error}") from error
        return tuple(made["input_ids"])


def row_of(served: PromptEntry, row: str | Mapping[str, Any]) -> dict[str, Any]:
    """The row as the template reads it.

    Raises:
        ValueError: a text alone for a template of several columns.
    """
    if not isinstance(row, str):
        return dict(row)
    if len(served.fields) != 1:
        raise ValueError(
            f"prompt {served.name!r} reads the columns {', '.join(served.fields)}; send each row as an object of them"
        )
    return {served.fields[0]: row}


def refuse_unknown(backbone: Backbone, request: EngineRequest, where: str) -> None:
    """Refuse a row, or labels of it, with tokens that the backbone has no embedding for.

    Raises:
        ValueError: naming the token by its text.
    """
    refuse_unknown_tokens(backbone, request.ids, where, called(backbone))
    if isinstance(request.work, ClassifyParams) and not needs_head(backbone):
        for candidate in request.work.candidates:
            refuse_unknown_tokens(backbone, candidate, f"a label of {where}", called(backbone))


def refuse_long(backbone: Backbone, served: PromptEntry, tokens: int, answer: int) -> None:
    """Refuse what does not fit the backbone's positions, or a decoder's attention window.

    Args:
        tokens: of the text.
        answer: tokens to be written behind it, or in an encoder-decoder's other part.

    Raises:
        ValueError: naming both numbers.
    """
    limits = [backbone.max_positions]
    if backbone.architecture == "causal":
        limits.append(sliding_window(backbone))
    known = [limit for limit in limits if limit is not None]
    apart = backbone.max_answer_positions if backbone.architecture == "encoder_decoder" else None
    if apart is not None and answer > apart:
        raise ValueError(
            f"an answer of {answer} tokens exceeds the {apart} positions of {called(backbone)}; ask for fewer tokens"
        )
    total = tokens if backbone.architecture == "encoder_decoder" else tokens + answer
    if known and served.length + total > min(known):
        raise ValueError(
            f"the prompt's {served.length} positions and {total} for input and answer exceed the {min(known)} of "
            f"{called(backbone)}; shorten the input or ask for fewer tokens"
        )


def _with_labels(
    backbone: Backbone,
    served: PromptEntry,
    rows: Sequence[str | Mapping[str, Any]],
    labels: Sequence[str] | None,
    max_input_tokens: int,
) -> list[tuple[tuple[int, ...], ClassifyParams]]:
    if labels is None:
        raise ValueError(f"prompt {served.name!r} has no labels of its own; send labels")
    if served.head is not None:
        own_choice(served, labels)
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels {', '.join(labels)[:200]} name one twice; name each once")
    task = Task(name="labels", template="{text}", label="label", label_words={label: label for label in labels})
    with _tokenizing:
        work = ClassifyParams(candidates=answer_ids(task, backbone.tokenizer))
    longest = max(map(len, work.candidates))
    if longest > _MAX_LABEL:
        raise ValueError(f"a label has {longest} tokens, and at most {_MAX_LABEL} are taken; choose shorter labels")
    if backbone.architecture == "encoder" and longest > 1:
        raise ValueError(f"a label has {longest} tokens, and an encoder's mask holds one; choose shorter labels")
    found = []
    for row in rows:
        if served.task is not None and not isinstance(row, str):
            ids = _some(_tokens(backbone, served.task, row))
        elif isinstance(given := row if isinstance(row, str) else row.get("text"), str):
            ids = _some(_tokens(backbone, _PLAIN, {"text": given}))
        else:
            raise ValueError(f"prompt {served.name!r} has no template; send each row as a text")
        _refuse_beyond(len(ids), max_input_tokens)
        refuse_long(backbone, served, len(ids), longest)
        found.append((ids, work))
    return found


def _tokens(backbone: Backbone, task: Task, row: Mapping[str, Any]) -> tuple[int, ...]:
    with _tokenizing:
        closing = backbone.architecture != "causal"
        found = encode_rows(task, backbone.tokenizer, [row], _NO_LIMIT, closing=closing, answers=False)[0]
        return found[0].input_ids


def _some(ids: Sequence[int]) -> tuple[int, ...]:
    if not ids:
        raise ValueError("the text has no token; send at least one")
    return tuple(ids)


def _refuse_beyond(tokens: int, most: int) -> None:
    if tokens > most:
        raise ValueError(f"the input has {tokens} tokens, and at most {most} are taken; shorten it")
