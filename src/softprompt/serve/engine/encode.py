"""Turns what a client sends into tokens, and rejects what cannot be answered before it reaches a batch."""

import base64
import io
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from tokenizers.decoders import ByteLevel
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.image_processor import Picture
from softprompt.models import model_class
from softprompt.models.config_checks import sliding_window
from softprompt.models.input_checks import check_token_ids
from softprompt.serve.engine.request import ClassifyParams, EngineRequest, GenerateParams, InvalidParameter
from softprompt.serve.prompts.entry import PromptEntry, display_name, needs_head
from softprompt.tasks import Task
from softprompt.tasks.data.chat import chat_ids
from softprompt.tasks.data.tokenize import TEXT_TASK, answer_ids
from softprompt.tasks.data.tokenize import encode as encode_rows
from softprompt.tasks.data.tokenize import template_prefix as task_template_prefix

_tokenizer_lock = threading.Lock()
"""A fast tokenizer keeps settings between calls and is not thread-safe."""
_NO_LIMIT = 1_000_000_000
_MAX_PIXELS = 40_000_000
"""Pixels of an image: a small file may decompress to any size."""
_MIN_TEMPLATE_PREFIX = 16
"""Tokens at the start of a template from which on caching their keys and values is worth the memory."""
_MAX_LABEL_TOKENS = 32
"""Tokens of a label that a request brings: each costs a row of logits over the vocabulary, for every row and label."""

_longest_pieces: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
"""For each tokenizer the most characters that one of its tokens may stand for."""
_SHRINKING = 4
"""How many times shorter a tokenizer may make a text before it looks for tokens: NFC composes up to 4 characters to
one, and others join spaces. Words come nowhere near it, since few tokens are as long as the longest."""

Cells = str | Mapping[str, Any]
"""A row: its template's columns, or a text alone."""


def classification(
    backbone: Backbone,
    entry: PromptEntry,
    rows: Sequence[Cells],
    labels: Sequence[str] | None,
    max_input_tokens: int,
) -> list[tuple[tuple[int, ...], ClassifyParams]]:
    """Each row's tokens and candidates; rows of a task are truncated as in training, others rejected if too long.

    Raises:
        ValueError: no rows; a row without a column, too long or without a token; labels missing or not possible.
    """
    if not rows:
        raise ValueError("there are no rows; give at least one")
    if backbone.takes_images:
        raise ValueError(
            f"{display_name(backbone)} takes images, but prompt {entry.name!r} has no image task; serve a run's folder"
        )
    if entry.task is None or labels is not None:
        return _with_labels(backbone, entry, rows, labels, max_input_tokens)
    if not entry.classifies:
        raise ValueError(f"prompt {entry.name!r} generates text; ask for a completion, or send labels")
    cells = [_template_cells(entry, row) for row in rows]
    params = ClassifyParams(candidates=entry.candidates)
    limit = _input_limit(entry, max_input_tokens)
    return [(ids, params) for ids in _encode(backbone, entry.task, cells, limit, truncate=True)]


def completion(
    backbone: Backbone,
    entry: PromptEntry,
    text: Cells | Sequence[int],
    max_new_tokens: int,
    max_input_tokens: int,
) -> tuple[int, ...]:
    """The tokens to continue, from a text, a row of the prompt's template, or token ids.

    Raises:
        ValueError: the backbone generates no text, an id is not in the vocabulary, there is no token, or there is no
            room for the answer.
    """
    if not model_class(backbone).generates:
        raise ValueError(f"{display_name(backbone)} ({backbone.architecture}) writes no text; classify instead")
    if isinstance(text, str):
        [ids] = _encode(backbone, TEXT_TASK, [{"text": text}], max_input_tokens)
    elif isinstance(text, Mapping):
        if entry.task is None:
            raise ValueError(f"prompt {entry.name!r} has no template for a row; give the text itself")
        if entry.task.messages:
            raise ValueError(f"prompt {entry.name!r} was trained on conversations; send messages to a chat completion")
        [ids] = _encode(backbone, entry.task, [dict(text)], _input_limit(entry, max_input_tokens), truncate=True)
    else:
        ids, size = tuple(text), backbone.vocab_size
        if unknown := [token for token in ids if not 0 <= token < size]:
            raise ValueError(f"token {unknown[0]} is not in the vocabulary of {size}; send ids from 0 to {size - 1}")
        _check_not_empty(ids)
    _check_input_length(len(ids), max_input_tokens)
    check_length(backbone, entry, len(ids), max_new_tokens)
    return ids


def chat(backbone: Backbone, messages: Sequence[Mapping[str, str]], max_input_tokens: int) -> tuple[int, ...]:
    """The tokens of a conversation, laid out by the tokenizer's chat template as for training.

    Only the template writes control tokens; their names in a message are plain text.

    Raises:
        ValueError: there is no chat template, it rejects the conversation, or that is far too long.
    """
    tokenizer = backbone.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{display_name(backbone)} has no chat template; ask for a completion")
    _check_characters(
        backbone, "the conversation", sum(len(message["content"]) for message in messages), max_input_tokens
    )
    with _tokenizer_lock:
        return chat_ids(tokenizer, messages, source=display_name(backbone))


def template_prefix(backbone: Backbone, entry: PromptEntry) -> tuple[int, ...]:
    """The tokens that all rows of the prompt's template start with, if caching their keys and values is worth it."""
    if entry.task is None or sliding_window(backbone) is not None:  # in a window, they would take other tokens' room
        return ()
    with _tokenizer_lock:
        ids = task_template_prefix(entry.task, backbone.tokenizer)
    return ids if _MIN_TEMPLATE_PREFIX <= len(ids) < (entry.max_input_tokens or 0) else ()


def head_params(entry: PromptEntry, labels: Sequence[str] | None) -> ClassifyParams:
    """The labels of the prompt's trained head.

    Raises:
        ValueError: the request brings labels of its own.
    """
    if labels is not None:
        raise ValueError(f"prompt {entry.name!r} answers through a head for its own labels; leave labels out")
    return ClassifyParams(candidates=entry.candidates)


def images(
    backbone: Backbone, entry: PromptEntry, rows: Sequence[Cells]
) -> list[Float[Tensor, "channel height width"]]:
    """Each row's image, preprocessed for the backbone.

    Raises:
        ValueError: no rows, or an image that cannot be read or is too large.
    """
    if not rows:
        raise ValueError("there are no rows; give at least one")
    assert entry.task is not None
    column, size = entry.task.image, entry.max_input_tokens or int(backbone.tokenizer.size)
    pixels = []
    for number, row in enumerate(rows, start=1):
        cell = row if isinstance(row, str | bytes) else row.get(column)
        content = _image_bytes(cell, f"row {number}", column)
        pixels.append(Picture({"bytes": content}, backbone.tokenizer, size, f"row {number}").pixels())
    return pixels


def check_tokens(backbone: Backbone, request: EngineRequest, label: str) -> None:
    """Check that the backbone has an embedding for each token of a row and of its labels.

    Raises:
        ValueError: naming the token by its text.
    """
    check_token_ids(backbone, request.ids, label, display_name(backbone))
    if isinstance(request.params, ClassifyParams) and not needs_head(backbone):
        for candidate in request.params.candidates:
            check_token_ids(backbone, candidate, f"a label of {label}", display_name(backbone))


def check_generation(backbone: Backbone, params: GenerateParams) -> None:
    """Check that the backbone can do with its logits what a generation asks.

    Raises:
        ValueError: an input is to be scored without `logprobs`.
        InvalidParameter: the backbone is an encoder-decoder, or a biased token is not in its vocabulary.
    """
    if params.score_input and params.logprobs is None:
        raise ValueError("score_input reports log-probabilities; set logprobs too")
    fields = {"logprobs": params.logprobs is not None, "logit_bias": params.logit_bias}
    fields |= {"presence_penalty": params.presence_penalty, "frequency_penalty": params.frequency_penalty}
    asked = [name for name, value in fields.items() if value]
    if asked and not model_class(backbone).decoder_only:
        raise InvalidParameter(
            asked[0],
            f"needs a decoder-only model, but {display_name(backbone)} ({backbone.architecture}) is not; leave it out",
        )
    size = backbone.vocab_size
    if unknown := [token for token in params.logit_bias if not 0 <= token < size]:
        raise InvalidParameter(
            "logit_bias",
            f"names token {unknown[0]}, which is not in the vocabulary of {size}; send ids from 0 to {size - 1}",
        )


def check_length(backbone: Backbone, entry: PromptEntry, input_tokens: int, answer_tokens: int) -> None:
    """Check that prompt, input and answer fit the backbone's positions, a decoder's window and the prompt's offsets.

    Args:
        answer_tokens: generated after the input, or in the decoder of an encoder-decoder.

    Raises:
        ValueError: with the length and the limit.
    """
    architecture, answer_limit = model_class(backbone), backbone.max_answer_positions
    if answer_limit is not None and answer_tokens > answer_limit:
        raise ValueError(
            f"an answer of {answer_tokens} tokens exceeds the {answer_limit} positions of {display_name(backbone)}; "
            "ask for fewer tokens"
        )
    total = input_tokens + (answer_tokens if architecture.answer_in_sequence else 0)
    row_limit = architecture.row_limit(backbone)
    if row_limit is not None and entry.length + total > row_limit:
        raise ValueError(
            f"the prompt's {entry.length} positions and {total} for input and answer exceed the {row_limit} of "
            f"{display_name(backbone)}; shorten the input or ask for fewer tokens"
        )
    # The answer's last token is never fed.
    fed = input_tokens + (max(answer_tokens - 1, 0) if architecture.answer_in_sequence else 0)
    if (offsets := entry.prompt.max_input_length) is not None and fed > offsets:
        raise ValueError(
            f"the input and its answer have {fed} tokens, but prompt {entry.name!r} has offsets for {offsets}; shorten "
            "the input or ask for fewer tokens"
        )


def _with_labels(
    backbone: Backbone,
    entry: PromptEntry,
    rows: Sequence[Cells],
    labels: Sequence[str] | None,
    max_input_tokens: int,
) -> list[tuple[tuple[int, ...], ClassifyParams]]:
    if labels is None:
        raise ValueError(f"prompt {entry.name!r} has no labels of its own; send labels")
    if entry.head is not None:
        head_params(entry, labels)
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels {', '.join(labels)[:200]} name one twice; name each once")
    _check_characters(backbone, "a label", max(map(len, labels)), _MAX_LABEL_TOKENS)
    task = Task(name="labels", template="{text}", label="label", label_words={label: label for label in labels})
    with _tokenizer_lock:
        params = ClassifyParams(candidates=answer_ids(task, backbone.tokenizer))
    longest = max(map(len, params.candidates))
    if longest > _MAX_LABEL_TOKENS:
        raise ValueError(f"a label has {longest} tokens, but at most {_MAX_LABEL_TOKENS} are allowed; shorten it")
    label_limit = model_class(backbone).max_label_tokens
    if label_limit is not None and longest > label_limit:
        raise ValueError(f"a label has {longest} tokens, but an encoder's mask holds one; choose shorter labels")
    inputs = []
    for row in rows:
        if entry.task is not None and not entry.task.messages and not isinstance(row, str):
            [ids] = _encode(backbone, entry.task, [row], max_input_tokens)
        elif isinstance(text := row if isinstance(row, str) else row.get("text"), str):
            [ids] = _encode(backbone, TEXT_TASK, [{"text": text}], max_input_tokens)
        else:
            raise ValueError(f"prompt {entry.name!r} has no template; send each row as a text")
        _check_input_length(len(ids), max_input_tokens)
        check_length(backbone, entry, len(ids), longest)
        inputs.append((ids, params))
    return inputs


def _encode(
    backbone: Backbone, task: Task, rows: Sequence[Mapping[str, Any]], max_input_tokens: int, *, truncate: bool = False
) -> list[tuple[int, ...]]:
    """The rows' tokens through the task's template, at least one for each.

    Args:
        max_input_tokens: longer rows are truncated; or if they are far longer rejected, and the others left to the
            caller, who knows their length.
    """
    appends_eos = model_class(backbone).appends_eos
    if task is not TEXT_TASK:
        for number, row in enumerate(rows, start=1):
            task.check_input(row, f"row {number}")
    if truncate:
        most = _max_characters(backbone.tokenizer, max_input_tokens)
        rows = [{name: cell[:most] if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows]
    else:
        for row in rows:
            cells = (row.get(column) for column in task.inputs)
            length = sum(len(cell) for cell in cells if isinstance(cell, str))
            _check_characters(backbone, "the input", length, max_input_tokens)
    limit = max_input_tokens if truncate else _NO_LIMIT
    with _tokenizer_lock:
        encoded = encode_rows(task, backbone.tokenizer, rows, limit, appends_eos=appends_eos, answers=False)[0]
    for example in encoded:
        _check_not_empty(example.input_ids)
    return [tuple(example.input_ids) for example in encoded]


def _template_cells(entry: PromptEntry, row: Cells) -> dict[str, Any]:
    if not isinstance(row, str):
        return dict(row)
    if len(entry.fields) != 1:
        raise ValueError(
            f"prompt {entry.name!r} reads the columns {', '.join(entry.fields)}; send each row as an object of them"
        )
    return {entry.fields[0]: row}


def _image_bytes(cell: Any, label: str, column: str) -> bytes:
    """The content of an image file, sent as bytes or base64; never read from a path of this machine."""
    if isinstance(cell, str):
        try:
            cell = base64.b64decode(re.sub(r"^data:image/[a-z.+-]+;base64,", "", cell), validate=True)
        except ValueError:
            cell = None
    if not isinstance(cell, bytes) or not cell:
        raise ValueError(f"{label} has no image in {column!r}; send its file's bytes in base64")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(cell)) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{label} has an image that is too large ({error}); send at most {_MAX_PIXELS} pixels"
        ) from None
    except OSError:  # no image; rejected where it is read
        return cell
    if width * height > _MAX_PIXELS:
        raise ValueError(f"{label} has an image of {width} x {height}; send at most {_MAX_PIXELS} pixels")
    return cell


def _input_limit(entry: PromptEntry, max_input_tokens: int) -> int:
    return min(entry.max_input_tokens or max_input_tokens, max_input_tokens)


def _check_characters(backbone: Backbone, what: str, characters: int, max_tokens: int) -> None:
    """Reject what cannot be short enough before it is tokenized, for which all other requests would wait."""
    if characters > _max_characters(backbone.tokenizer, max_tokens):
        raise ValueError(
            f"{what} has {characters} characters, more than the {max_tokens} tokens allowed can have; shorten it"
        )


def _max_characters(tokenizer: Any, max_tokens: int) -> int:
    """Characters that `max_tokens` tokens cannot exceed."""
    longest = _longest_pieces.get(tokenizer)
    if longest is None:
        backend = tokenizer.backend_tokenizer
        lossless = backend.normalizer is None and isinstance(backend.decoder, ByteLevel)
        longest = max(map(len, tokenizer.get_vocab())) * (1 if lossless else _SHRINKING)
        _longest_pieces[tokenizer] = longest
    return max_tokens * longest


def _check_not_empty(ids: Sequence[int]) -> None:
    if not ids:
        raise ValueError("the text has no token; send at least one")


def _check_input_length(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ValueError(f"the input has {tokens} tokens, but at most {limit} are allowed; shorten it")
