"""Tokenization of rows: the rendered template, truncated inside its longest field if too long, and the answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from softprompt.backbones.image_processor import Picture, Processor
from softprompt.tasks.data.chat import encode_chats
from softprompt.tasks.data.control_tokens import Part, Span, Tokenizer, control_tokens
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.tabular import records, row_name, row_number, row_origin
from softprompt.tasks.task import Task
from softprompt.tasks.template import parse

_ROWS, _CHARACTERS = 1000, 1 << 18
"""Limits of rows and characters tokenized at once, so that memory is bounded by the ids that are stored."""

TEXT_TASK = Task(name="text", template="{text}", target="answer", metrics=("exact_match",))
"""A text as it is."""
_TEXT = "the text"
"""The name in errors of a text that is not from a row."""


def encode(
    task: Task,
    tokenizer: Tokenizer,
    rows: Iterable[Mapping[str, Any]],
    max_input_tokens: int,
    *,
    appends_eos: bool = False,
    answers: bool = True,
) -> tuple[Sequence[Example], int]:
    """Tokenize rows in order; returns the examples and how many of them were truncated.

    A row of more than `max_input_tokens` loses the end of its longest field, so the template's own text is kept, above
    all the cue for the answer. The answer is not counted. A generated answer ends with one end-of-sequence token, also
    if its text already ends with it; a label word has none.

    A row's content is plain text: control tokens (`<|im_end|>`, `<mask>`) are recognized only in the template.

    Image rows become examples whose image is decoded when they are batched; they are never truncated, and neither are
    conversations (`encode_chats`).

    Args:
        task: renders the rows.
        tokenizer: a fast tokenizer; for a vision model, its image processor.
        rows: have every column of the template.
        max_input_tokens: the limit of the input, special tokens included; for an image, its side in pixels.
        appends_eos: keep the special tokens that the tokenizer appends, as encoders expect.
        answers: read the answers; False: rows need not have any.

    Raises:
        ValueError: a row that does not render or is not valid text, a template longer than `max_input_tokens`, or a
            tokenizer that is not fast.
    """
    check_input_kind(task, tokenizer)
    if task.image:
        return encode_pictures(task, tokenizer, rows, max_input_tokens, answers=answers), 0
    _check_fast(tokenizer)
    if task.messages:
        return encode_chats(task, tokenizer, rows, max_input_tokens, appends_eos=appends_eos, answers=answers), 0
    label_ids = answer_ids(task, tokenizer) if answers and task.is_classification else ()
    examples, truncated = Examples(row_origin(rows)), 0
    words_end = any(strip_end(word, tokenizer) != word for word in task.answers)
    for chunk in _chunks(task, rows):
        names = [name for *_, name in chunk]
        inputs = _tokens(tokenizer, [parts for _, parts, _ in chunk], appends_eos, names)
        labels: list[int | None] = [None] * len(chunk)
        targets: Sequence[tuple[int, ...]] = [()] * len(chunk)
        if answers and task.is_classification:
            labels = [int(task.answer(row, name)) for row, _, name in chunk]
            targets = [label_ids[label] for label in labels if label is not None]
            examples.answers_ended += len(chunk) * words_end
        elif answers:
            targets = _targets(task, tokenizer, [row for row, *_ in chunk], names, examples)
        for (row, parts, name), ids, target, label in zip(chunk, inputs, targets, labels, strict=True):
            if len(ids) > max_input_tokens:
                ids = _truncate(task, tokenizer, parts, max_input_tokens, appends_eos, name)
                truncated += 1
            examples.append(ids, target, label, row_number(row, len(examples)))
    return examples, truncated


def strip_end(text: str, tokenizer: Tokenizer) -> str:
    """Remove the tokenizer's end-of-sequence text (`</s>`) from the end of an answer, where some tutorials write it.

    >>> from types import SimpleNamespace
    >>> strip_end("good</s>", SimpleNamespace(eos_token="</s>"))
    'good'
    """
    end = tokenizer.eos_token
    while end and text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return text


def template_prefix(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that rows start with: those of the template's text before its first column, without the last.

    The last token may merge with the column's text. In rare cases so may the others: compare with a row's tokens before
    relying on them.
    """
    literals = takewhile(lambda part: not part[0], parse(task.template))
    return tuple(_tokens(tokenizer, [list(literals)], appends_eos=False)[0][:-1])


def check_input_kind(task: Task, tokenizer: Tokenizer) -> None:
    """Check that an image task has a vision backbone, and a text task a text backbone.

    Raises:
        ValueError: one has the other's.
    """
    if bool(task.image) != isinstance(tokenizer, Processor):
        has, reads = ("images", "text") if task.image else ("text", "images")
        raise ValueError(
            f"task {task.name!r} has {has}, but the backbone reads {reads}; choose another task or another backbone"
        )


def encode_pictures(
    task: Task, processor: Processor, rows: Iterable[Mapping[str, Any]], size: int, *, answers: bool
) -> list[Example]:
    """Make examples of image rows, in order; an image is decoded when it is batched.

    Raises:
        ValueError: a row without an image, or without a label if `answers` are read.
    """
    examples = []
    for number, row in enumerate(records(rows)):
        where = row_name(rows, row, number)
        if not task.render(row, where):
            raise ValueError(f"{where} has no image in column {task.image!r}; give it one or leave the row out")
        label = int(task.answer(row, where)) if answers else None
        picture = Picture(row[task.image], processor, size, where)
        examples.append(Example((), () if label is None else (label,), label, number, picture, where))
    return examples


def answer_ids(task: Task, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each class's label word, in class order; for an image task, the class indices.

    Raises:
        ValueError: a label word without tokens, or with tokens that are a prefix of another's, by name.
    """
    if task.image:
        return tuple((index,) for index in range(len(task.label_words)))
    _check_fast(tokenizer)
    words_by_ids: dict[tuple[int, ...], str] = {}
    label_words = [strip_end(word, tokenizer) for word in task.answers]
    for word, ids in zip(task.answers, _answers(tokenizer, label_words, ["a label"] * len(label_words)), strict=True):
        if not ids or all(token == tokenizer.unk_token_id for token in ids):
            raise ValueError(
                f"the word {word!r} of task {task.name!r} has no tokens in this vocabulary; use another one"
            )
        if ids in words_by_ids:
            raise ValueError(
                f"the words {words_by_ids[ids]!r} and {word!r} of task {task.name!r} are the same tokens to this "
                "tokenizer; use words that differ"
            )
        for other_ids, other in words_by_ids.items():
            if other_ids[: len(ids)] == ids or ids[: len(other_ids)] == other_ids:
                raise ValueError(
                    f"of the words {other!r} and {word!r} of task {task.name!r}, one is a prefix of the other in "
                    "tokens, so the longer one could never win; use words that start differently"
                )
        words_by_ids[ids] = word
    return tuple(words_by_ids)


def _check_fast(tokenizer: Tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so it has no character offsets; "
            "load it with AutoTokenizer and use_fast=True"
        )


_Row = tuple[Mapping[str, Any], list[Part], str]


def _chunks(task: Task, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[_Row]]:
    """Rows with their parts and names, in chunks that are tokenized together."""
    chunk: list[_Row] = []
    size = 0
    for index, row in enumerate(records(rows)):
        name = row_name(rows, row, index)
        parts = task.pieces(row, name)
        chunk.append((row, parts, name))
        size += sum(len(text) for _, text in parts)
        if len(chunk) == _ROWS or size >= _CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _join(parts: Sequence[Part]) -> str:
    return "".join(text for _, text in parts)


def _tokens(
    tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], appends_eos: bool, names: Sequence[str] = ()
) -> list[list[int]]:
    """Token ids of each text, with the leading special tokens and, if `appends_eos`, the trailing ones."""
    if not texts:
        return []
    full_texts = [_join(parts) for parts in texts]
    names = names or [_TEXT] * len(texts)
    encoding = _call(tokenizer, full_texts, names, return_special_tokens_mask=True)
    control, result, suspects = control_tokens(tokenizer), list[list[int]](), list[int]()
    for ids, special, text in zip(encoding["input_ids"], encoding["special_tokens_mask"], full_texts, strict=True):
        start, end = special.index(0) if 0 in special else len(special), _end(special, appends_eos=False)
        if control.suspects(ids[start:end], text):
            suspects.append(len(result))
        result.append(ids if appends_eos else ids[:end])
    checked = _tokens_with_spans(tokenizer, [texts[i] for i in suspects], appends_eos, [names[i] for i in suspects])
    for index, (ids, _, _) in zip(suspects, checked, strict=True):
        result[index] = ids
    return result


def _tokens_with_spans(
    tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], appends_eos: bool, names: Sequence[str]
) -> list[tuple[list[int], list[Span], Sequence[Part]]]:
    """Token ids of each text, their spans, and the parts that the spans refer to; a row's content is read as text."""
    if not texts:
        return []
    full_texts = [_join(parts) for parts in texts]
    encoding = _call(tokenizer, full_texts, names, return_special_tokens_mask=True, return_offsets_mapping=True)
    control, result = control_tokens(tokenizer), list[tuple[list[int], list[Span], Sequence[Part]]]()
    rows = zip(encoding["input_ids"], encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
    for name, parts, (ids, special, spans) in zip(names, texts, rows, strict=True):
        if control.foreign(ids, special, spans, parts):
            ids, special, spans, parts = control.encode(parts, special=True, where=name)
        end = _end(special, appends_eos=appends_eos)
        result.append((list(ids[:end]), list(spans[:end]), parts))
    return result


def _end(special: Sequence[int], *, appends_eos: bool) -> int:
    """The number of tokens to keep: all, or without `appends_eos` all but the trailing special tokens."""
    end = len(special)
    # Stop if only special tokens are left: those of an empty text are all leading ones.
    while not appends_eos and end and special[end - 1] and 0 in special[:end]:
        end -= 1
    return end


def _call(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str], **more: Any) -> Any:
    """Call the tokenizer without truncation or padding.

    Raises:
        ValueError: a text has half a surrogate pair, by the name of its row.
    """
    try:
        return tokenizer(
            list(texts),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **{"add_special_tokens": True, **more},
        )
    except (TypeError, UnicodeEncodeError):
        for name, text in zip(names, texts, strict=True):
            if broken := next((char for char in text if "\ud800" <= char <= "\udfff"), None):
                raise ValueError(
                    f"{name} holds half of a surrogate pair ({broken!a}), which is not text; write the whole "
                    "character or leave it out"
                ) from None
        raise


def _truncate(
    task: Task, tokenizer: Tokenizer, parts: Sequence[Part], max_input_tokens: int, appends_eos: bool, name: str
) -> list[int]:
    """Token ids after cutting the end of the longest field, repeatedly until they fit."""
    parts = list(parts)
    while True:
        [(ids, spans, encoded_parts)] = _tokens_with_spans(tokenizer, [parts], appends_eos, [name])
        excess = len(ids) - max_input_tokens
        if excess <= 0:
            return ids
        fields = _field_tokens(encoded_parts, spans)
        ranked = sorted(fields, key=lambda index: len(fields[index]), reverse=True)
        if not ranked or not fields[ranked[0]]:
            raise ValueError(
                f"the template of task {task.name!r} alone has {len(ids)} tokens, but the limit is {max_input_tokens}; "
                "raise max_input_tokens or shorten the template"
            )
        longest, tokens = ranked[0], fields[ranked[0]]
        lead = len(tokens) - (len(fields[ranked[1]]) if len(ranked) > 1 else 0)
        # Cut down to the second longest field; of two equal ones cut half of the excess here and half from the other.
        drop = min(excess, len(tokens), max(lead, -(-excess // 2)))
        text = parts[longest][1]
        parts[longest] = (True, text[: tokens[-drop]].rstrip())


def _field_tokens(parts: Sequence[Part], spans: Sequence[Span]) -> dict[int, list[int]]:
    """The offset of each token in each field's text; 0 for a token that starts before the field."""
    offsets, start = {}, 0
    for index, (is_field, text) in enumerate(parts):
        end = start + len(text)
        if is_field:
            offsets[index] = [max(first - start, 0) for first, last in spans if first < end and last > start]
        start = end
    return offsets


def _targets(
    task: Task, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], names: Sequence[str], examples: Examples
) -> list[tuple[int, ...]]:
    """The token ids of each row's answer with one end of sequence; counts `answers_ended` in `examples`."""
    texts = []
    for name, row in zip(names, rows, strict=True):
        answer = str(task.answer(row, name))
        text = strip_end(answer, tokenizer)
        if text != answer:
            examples.answers_ended += 1
            if not text.strip():
                raise ValueError(
                    f"{name} has the answer {answer!r} in column {task.target!r}, which is an end of sequence "
                    "and nothing before it; give it an answer or leave the row out"
                )
        texts.append(task.lead + text)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has no end-of-sequence token, which a generated answer ends with; set eos_token"
        )
    return [(*ids, tokenizer.eos_token_id) for ids in _answers(tokenizer, texts, names)]


def _answers(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> list[tuple[int, ...]]:
    """The token ids of each text by itself, or after a colon if it starts with a space.

    Some tokenizers (Llama 2's) add a space before the first word, so " yes" by itself would start with two; after other
    text it has the tokens that the model knows. With most tokenizers the two are equal.
    """
    colon = _plain(tokenizer, [[(False, ":")]], [_TEXT])[0]
    separate = _plain(tokenizer, [[(True, text)] for text in texts], names)
    after_colon = _plain(tokenizer, [[(False, ":"), (True, text)] for text in texts], names)
    result = []
    for text, ids, ids_with_colon in zip(texts, separate, after_colon, strict=True):
        follows = text[:1] == " " and ids_with_colon[: len(colon)] == colon and len(ids_with_colon) > len(colon)
        result.append(tuple(ids_with_colon[len(colon) :] if follows else ids))
    return result


def _plain(tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], names: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without the tokenizer's special tokens."""
    if not texts:
        return []
    full_texts = [_join(parts) for parts in texts]
    encoded: list[list[int]] = _call(tokenizer, full_texts, names, add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer)
    return [
        control.encode(parts, special=False, where=name)[0] if control.suspects(ids, text) else ids
        for name, ids, parts, text in zip(names, encoded, texts, full_texts, strict=True)
    ]
