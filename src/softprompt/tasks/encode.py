"""Rows as token ids: the rendered template, shortened inside a field where it is too long, and the answer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, final

from softprompt.pixels import Picture, Processor
from softprompt.tasks.base import Task
from softprompt.tasks.rows import records, row_name
from softprompt.tasks.template import parse

Tokenizer = Any
"""A fast `transformers` tokenizer: one that knows each token's place in the text."""


@final
@dataclass(frozen=True)
class Example:
    """One row in token ids, or with its image."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """What is to be answered, behind the input; empty where there is no answer."""
    label: int | None
    """The class, in a classification."""
    row: int
    """The row's place among those encoded, from 0."""
    picture: Picture | None = None
    """The image, where that is the input; it is decoded when a batch is made."""
    where: str = ""
    """What an error calls the row: by its number in its own file, counted from 1, and that file."""


def encode(
    task: Task,
    tokenizer: Tokenizer,
    rows: Iterable[Mapping[str, Any]],
    max_tokens: int,
    *,
    closing: bool = False,
    answers: bool = True,
) -> tuple[list[Example], int]:
    """Examples of all rows in their order, and how many of them had to be shortened.

    A row of more than `max_tokens` loses the end of its longest field, so the template's own words survive, the cue
    for the answer in front of all. An answer never counts: it comes on top. A generated answer ends with the
    tokenizer's end of sequence, so that generating stops; a label's word has no end.

    Rows of images become examples whose image is decoded when a batch is made of them; none is ever shortened.

    Args:
        task: renders the rows.
        tokenizer: fast; of a vision model its image processor.
        rows: with every column of the template.
        max_tokens: the input's limit, special tokens included; of an image its side in pixels.
        closing: keep the special tokens that the tokenizer appends (an encoder wants them).
        answers: read the answers; without, rows need none.

    Raises:
        ValueError: a row that does not render, a template longer than `max_tokens`, or a tokenizer that is not fast.
    """
    refuse_other_input(task, tokenizer)
    if task.image:
        return encode_pictures(task, tokenizer, rows, max_tokens, answers=answers), 0
    _check_fast(tokenizer)
    table = list(records(rows))
    names = [row_name(rows, row, place) for place, row in enumerate(table)]
    pieces = [task.pieces(row, where) for row, where in zip(table, names, strict=True)]
    found = _tokens(tokenizer, [_join(parts) for parts in pieces], closing)
    words = answer_ids(task, tokenizer) if answers and task.is_classification else ()
    examples, shortened = [], 0
    for number, (row, parts, (ids, _)) in enumerate(zip(table, pieces, found, strict=True)):
        if len(ids) > max_tokens:
            ids = _shorten(task, tokenizer, parts, max_tokens, closing)
            shortened += 1
        label: int | None = None
        answer: tuple[int, ...] = ()
        if answers:
            given = task.answer(row, names[number])
            if isinstance(given, int):
                label, answer = given, words[given]
            else:
                answer = _ended(tokenizer, _answer(tokenizer, task.lead + given))
        examples.append(Example(tuple(ids), answer, label, number, where=names[number]))
    return examples, shortened


def beginning(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that rows begin with: those of the template's words before its first column.

    The last one is left out, which may become another with what is in the column. So may the others in rare cases:
    compare before relying on them.
    """
    words = takewhile(lambda part: not part[0], parse(task.template))
    return tuple(_tokens(tokenizer, [_join(list(words))], closing=False)[0][0][:-1])


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
        return tuple((index,) for index in range(len(task.words)))
    _check_fast(tokenizer)
    found: dict[tuple[int, ...], str] = {}
    for word in task.answers:
        ids = _answer(tokenizer, word)
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


def _join(parts: Sequence[tuple[bool, str]]) -> str:
    return "".join(text for _, text in parts)


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], closing: bool) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and places of each text, with the special tokens in front and, if `closing`, those behind."""
    if not texts:
        return []
    made = tokenizer(
        list(texts),
        add_special_tokens=True,
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    found = []
    for ids, places, special in zip(
        made["input_ids"], made["offset_mapping"], made["special_tokens_mask"], strict=True
    ):
        end = len(ids)
        # The text's own tokens come first, so that a run of special ones without any text stays in front.
        while not closing and end and special[end - 1] and 0 in special[:end]:
            end -= 1
        found.append((list(ids[:end]), list(places[:end])))
    return found


def _shorten(
    task: Task, tokenizer: Tokenizer, parts: Sequence[tuple[bool, str]], max_tokens: int, closing: bool
) -> list[int]:
    """The ids after the longest field has lost its end, again and again until they fit."""
    parts = list(parts)
    while True:
        ids, places = _tokens(tokenizer, [_join(parts)], closing)[0]
        excess = len(ids) - max_tokens
        if excess <= 0:
            return ids
        fields = _field_tokens(parts, places)
        ranked = sorted(fields, key=lambda index: len(fields[index]), reverse=True)
        if not ranked or not fields[ranked[0]]:
            raise ValueError(
                f"the template of task {task.name!r} alone has {len(ids)} tokens, but the limit is {max_tokens}; "
                "raise max_tokens or shorten the template"
            )
        longest, tokens = ranked[0], fields[ranked[0]]
        lead = len(tokens) - (len(fields[ranked[1]]) if len(ranked) > 1 else 0)
        # Down to the second longest field; where there is no lead, half of what is too much, then the other's turn.
        drop = min(excess, len(tokens), max(lead, -(-excess // 2)))
        text = parts[longest][1]
        parts[longest] = (True, text[: tokens[-drop]].rstrip())


def _field_tokens(parts: Sequence[tuple[bool, str]], places: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Where each field's tokens begin within its text; a token that begins before it counts from its first letter."""
    found, start = {}, 0
    for index, (is_field, text) in enumerate(parts):
        end = start + len(text)
        if is_field:
            found[index] = [max(first - start, 0) for first, last in places if first < end and last > start]
        start = end
    return found


def _answer(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The tokens that `text` has on its own, or behind a colon if it begins with a space.

    Some tokenizers (Llama 2's) put a space of their own before a text's first word, so that " yes" alone would begin
    with two; behind other text it has the tokens that the model has seen. With most tokenizers the two are the same.
    """
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    if text[:1] == " ":
        colon = tokenizer(":", add_special_tokens=False)["input_ids"]
        behind = tokenizer(":" + text, add_special_tokens=False)["input_ids"]
        if behind[: len(colon)] == colon and len(behind) > len(colon):
            return tuple(behind[len(colon) :])
    return tuple(alone)


def _ended(tokenizer: Tokenizer, ids: tuple[int, ...]) -> tuple[int, ...]:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has no end-of-sequence token, which a generated answer ends with; set eos_token"
        )
    return (*ids, tokenizer.eos_token_id)
