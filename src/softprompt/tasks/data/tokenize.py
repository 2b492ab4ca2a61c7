"""Rows as token ids: the rendered template, shortened inside a field where it is too long, and the answer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from softprompt.backbones.image_processor import Picture, Processor
from softprompt.tasks.data.control_tokens import Part, Span, Tokenizer, control_tokens
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.tabular import records, row_name, row_number, row_origin
from softprompt.tasks.task import Task
from softprompt.tasks.template import parse

_ROWS, _CHARACTERS = 1000, 1 << 18
"""Most rows and characters that are tokenised at a time, so that memory is that of the ids that are kept."""

_TEXT = "the text"
"""What an error calls a text that is no row's."""


def encode(
    task: Task,
    tokenizer: Tokenizer,
    rows: Iterable[Mapping[str, Any]],
    max_input_tokens: int,
    *,
    closing: bool = False,
    answers: bool = True,
) -> tuple[Sequence[Example], int]:
    """Examples of all rows in their order, and how many of them had to be shortened.

    A row of more than `max_input_tokens` loses the end of its longest field, so the template's own words survive, the
    cue for the answer in front of all. An answer never counts: it comes on top. A generated answer ends with the
    tokenizer's end of sequence, so that generating stops, and not twice where its text ends with that already; a
    label's word has no end.

    What a row holds is text: control tokens (`<|im_end|>`, `<mask>`) are such only where the template has them.

    Rows of images become examples whose image is decoded when a batch is made of them; none is ever shortened.

    Args:
        task: renders the rows.
        tokenizer: fast; of a vision model its image processor.
        rows: with every column of the template.
        max_input_tokens: the input's limit, special tokens included; of an image its side in pixels.
        closing: keep the special tokens that the tokenizer appends (an encoder wants them).
        answers: read the answers; without, rows need none.

    Raises:
        ValueError: a row that does not render or is not whole text, a template longer than `max_input_tokens`, or a
            tokenizer that is not fast.
    """
    refuse_other_input(task, tokenizer)
    if task.image:
        return encode_pictures(task, tokenizer, rows, max_input_tokens, answers=answers), 0
    _check_fast(tokenizer)
    words = answer_ids(task, tokenizer) if answers and task.is_classification else ()
    examples, shortened = Examples(row_origin(rows)), 0
    ended = any(strip_end(word, tokenizer) != word for word in task.answers)
    for chunk in _chunks(task, rows):
        names = [name for *_, name in chunk]
        found = _tokens(tokenizer, [parts for _, parts, _ in chunk], closing, names)
        labels: list[int | None] = [None] * len(chunk)
        targets: Sequence[tuple[int, ...]] = [()] * len(chunk)
        if answers and task.is_classification:
            labels = [int(task.answer(row, name)) for row, _, name in chunk]
            targets = [words[label] for label in labels if label is not None]
            examples.answers_ended += len(chunk) * ended
        elif answers:
            targets = _targets(task, tokenizer, [row for row, *_ in chunk], names, examples)
        for (row, parts, name), ids, target, label in zip(chunk, found, targets, labels, strict=True):
            if len(ids) > max_input_tokens:
                ids = _shorten(task, tokenizer, parts, max_input_tokens, closing, name)
                shortened += 1
            examples.append(ids, target, label, row_number(row, len(examples)))
    return examples, shortened


def strip_end(text: str, tokenizer: Tokenizer) -> str:
    """An answer without the tokenizer's end of sequence (`</s>`) that its text ends with, as some tutorials write it.

    >>> from types import SimpleNamespace
    >>> strip_end("good</s>", SimpleNamespace(eos_token="</s>"))
    'good'
    """
    end = tokenizer.eos_token
    while end and text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return text


def beginning(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that rows begin with: those of the template's words before its first column.

    The last one is left out, which may become another with what is in the column. So may the others in rare cases:
    compare before relying on them.
    """
    words = takewhile(lambda part: not part[0], parse(task.template))
    return tuple(_tokens(tokenizer, [list(words)], closing=False)[0][:-1])


def refuse_other_input(task: Task, tokenizer: Tokenizer) -> None:
    """Refuse images for a backbone that reads text, and the other way round.

    Raises:
        ValueError: they do not fit.
    """
    if bool(task.image) != isinstance(tokenizer, Processor):
        has, wants = ("images", "text") if task.image else ("text", "images")
        raise ValueError(
            f"task {task.name!r} has {has} and the backbone reads {wants}; choose another task or another backbone"
        )


def encode_pictures(
    task: Task, processor: Processor, rows: Iterable[Mapping[str, Any]], size: int, *, answers: bool
) -> list[Example]:
    """Examples of all rows in their order; an image is decoded when a batch is made of it.

    Raises:
        ValueError: a row without an image, or without a label where `answers` are read.
    """
    found = []
    for number, row in enumerate(records(rows)):
        where = row_name(rows, row, number)
        if not task.render(row, where):
            raise ValueError(f"{where} has no image in column {task.image!r}; give it one or leave the row out")
        label = int(task.answer(row, where)) if answers else None
        picture = Picture(row[task.image], processor, size, where)
        found.append(Example((), () if label is None else (label,), label, number, picture, where))
    return found


def answer_ids(task: Task, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each class's word in token ids, in the order of the classes; of a task of images each class's number.

    Raises:
        ValueError: a word without tokens, or two words of which one's tokens begin the other's, by name.
    """
    if task.image:
        return tuple((index,) for index in range(len(task.label_words)))
    _check_fast(tokenizer)
    found: dict[tuple[int, ...], str] = {}
    words = [strip_end(word, tokenizer) for word in task.answers]
    for word, ids in zip(task.answers, _answers(tokenizer, words, ["a label"] * len(words)), strict=True):
        if not ids or all(one == tokenizer.unk_token_id for one in ids):
            raise ValueError(
                f"the word {word!r} of task {task.name!r} has no tokens in this vocabulary; use another one"
            )
        if ids in found:
            raise ValueError(
                f"the words {found[ids]!r} and {word!r} of task {task.name!r} are the same tokens to this tokenizer; "
                "use words that differ"
            )
        for other, its in ((found[one], one) for one in found):
            if its[: len(ids)] == ids or ids[: len(its)] == its:
                raise ValueError(
                    f"of the words {other!r} and {word!r} of task {task.name!r} one is the beginning of the other in "
                    "tokens, so that the longer could never win; use words that begin differently"
                )
        found[ids] = word
    return tuple(found)


def _check_fast(tokenizer: Tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is not a fast tokenizer and does not tell tokens' places; "
            "load it with AutoTokenizer and use_fast=True"
        )


_Row = tuple[Mapping[str, Any], list[Part], str]


def _chunks(task: Task, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[_Row]]:
    """Rows with their parts and names, as many at a time as are tokenised together."""
    chunk: list[_Row] = []
    size = 0
    for place, row in enumerate(records(rows)):
        name = row_name(rows, row, place)
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
    tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], closing: bool, names: Sequence[str] = ()
) -> list[list[int]]:
    """Ids of each text, with the special tokens in front and, if `closing`, those behind."""
    if not texts:
        return []
    joined = [_join(parts) for parts in texts]
    names = names or [_TEXT] * len(texts)
    made = _call(tokenizer, joined, names, return_special_tokens_mask=True)
    control, found, suspects = control_tokens(tokenizer), list[list[int]](), list[int]()
    for ids, special, text in zip(made["input_ids"], made["special_tokens_mask"], joined, strict=True):
        begin, end = special.index(0) if 0 in special else len(special), _end(special, closing=False)
        if control.suspects(ids[begin:end], text):
            suspects.append(len(found))
        found.append(ids if closing else ids[:end])
    placed = _placed(tokenizer, [texts[at] for at in suspects], closing, [names[at] for at in suspects])
    for at, (ids, _, _) in zip(suspects, placed, strict=True):
        found[at] = ids
    return found


def _placed(
    tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], closing: bool, names: Sequence[str]
) -> list[tuple[list[int], list[Span], Sequence[Part]]]:
    """Ids of each text, where each lies, and the parts in which it lies there; what a row holds is read as text."""
    if not texts:
        return []
    joined = [_join(parts) for parts in texts]
    made = _call(tokenizer, joined, names, return_special_tokens_mask=True, return_offsets_mapping=True)
    control, found = control_tokens(tokenizer), list[tuple[list[int], list[Span], Sequence[Part]]]()
    encoded = zip(made["input_ids"], made["special_tokens_mask"], made["offset_mapping"], strict=True)
    for name, parts, (ids, special, spans) in zip(names, texts, encoded, strict=True):
        if control.foreign(ids, special, spans, parts):
            ids, special, spans, parts = control.encode(parts, special=True, where=name)
        end = _end(special, closing=closing)
        found.append((list(ids[:end]), list(spans[:end]), parts))
    return found


def _end(special: Sequence[int], *, closing: bool) -> int:
    """How many tokens are kept: without `closing`, all but the special ones behind the text."""
    end = len(special)
    # The text's own tokens come first, so that a run of special ones without any text stays in front.
    while not closing and end and special[end - 1] and 0 in special[:end]:
        end -= 1
    return end


def _call(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str], **more: Any) -> Any:
    """The tokenizer's own answer.

    Raises:
        ValueError: a text that is not whole, by the number of its row.
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
            if broken := next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None):
                raise ValueError(
                    f"{name} holds half of a surrogate pair ({broken!a}), which is not text; write the whole "
                    "character or leave it out"
                ) from None
        raise


def _shorten(
    task: Task, tokenizer: Tokenizer, parts: Sequence[Part], max_input_tokens: int, closing: bool, name: str
) -> list[int]:
    """The ids after the longest field has lost its end, again and again until they fit."""
    parts = list(parts)
    while True:
        [(ids, places, shown)] = _placed(tokenizer, [parts], closing, [name])
        excess = len(ids) - max_input_tokens
        if excess <= 0:
            return ids
        fields = _field_tokens(shown, places)
        ranked = sorted(fields, key=lambda index: len(fields[index]), reverse=True)
        if not ranked or not fields[ranked[0]]:
            raise ValueError(
                f"the template of task {task.name!r} alone has {len(ids)} tokens, but the limit is {max_input_tokens}; "
                "raise max_input_tokens or shorten the template"
            )
        longest, tokens = ranked[0], fields[ranked[0]]
        lead = len(tokens) - (len(fields[ranked[1]]) if len(ranked) > 1 else 0)
        # Down to the second longest field; where there is no lead, half of what is too much, then the other's turn.
        drop = min(excess, len(tokens), max(lead, -(-excess // 2)))
        text = parts[longest][1]
        parts[longest] = (True, text[: tokens[-drop]].rstrip())


def _field_tokens(parts: Sequence[Part], places: Sequence[Span]) -> dict[int, list[int]]:
    """Where each field's tokens begin within its text; a token that begins before it counts from its first letter."""
    found, start = {}, 0
    for index, (is_field, text) in enumerate(parts):
        end = start + len(text)
        if is_field:
            found[index] = [max(first - start, 0) for first, last in places if first < end and last > start]
        start = end
    return found


def _targets(
    task: Task, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], names: Sequence[str], before: Examples
) -> list[tuple[int, ...]]:
    """What is to be written for each row, with one end of sequence."""
    texts = []
    for name, row in zip(names, rows, strict=True):
        given = str(task.answer(row, name))
        text = strip_end(given, tokenizer)
        if text != given:
            before.answers_ended += 1
            if not text.strip():
                raise ValueError(
                    f"{name} has the answer {given!r} in column {task.target!r}, which is an end of sequence "
                    "and nothing before it; give it an answer or leave the row out"
                )
        texts.append(task.lead + text)
    return [_ended(tokenizer, ids) for ids in _answers(tokenizer, texts, names)]


def _answers(tokenizer: Tokenizer, texts: Sequence[str], names: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens that each text has on its own, or behind a colon if it begins with a space.

    Some tokenizers (Llama 2's) put a space of their own before a text's first word, so that " yes" alone would begin
    with two; behind other text it has the tokens that the model has seen. With most tokenizers the two are the same.
    """
    colon = _plain(tokenizer, [[(False, ":")]], [_TEXT])[0]
    alone = _plain(tokenizer, [[(True, text)] for text in texts], names)
    behind = _plain(tokenizer, [[(False, ":"), (True, text)] for text in texts], names)
    found = []
    for text, ids, other in zip(texts, alone, behind, strict=True):
        follows = text[:1] == " " and other[: len(colon)] == colon and len(other) > len(colon)
        found.append(tuple(other[len(colon) :] if follows else ids))
    return found


def _plain(tokenizer: Tokenizer, texts: Sequence[Sequence[Part]], names: Sequence[str]) -> list[list[int]]:
    """Ids of each text without the special tokens that the tokenizer puts around one."""
    if not texts:
        return []
    joined = [_join(parts) for parts in texts]
    made: list[list[int]] = _call(tokenizer, joined, names, add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer)
    return [
        control.encode(parts, special=False, where=name)[0] if control.suspects(ids, text) else ids
        for name, ids, parts, text in zip(names, made, texts, joined, strict=True)
    ]


def _ended(tokenizer: Tokenizer, ids: tuple[int, ...]) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has no end-of-sequence token, which a generated answer ends with; set eos_token"
        )
    return (*ids, tokenizer.eos_token_id)
