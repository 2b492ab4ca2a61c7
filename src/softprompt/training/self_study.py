"""Queries that the model writes itself about a context, for a distillation without queries."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel, Sampling
from softprompt.models.sampling import before_end
from softprompt.tasks import Task
from softprompt.tasks.data.collate import collate
from softprompt.tasks.data.context import SEPARATOR
from softprompt.tasks.data.tokenize import encode

INSTRUCTIONS = (
    "Write one question about a particular fact in the text above.",
    "Write one request for a short summary of a part of the text above, and say which part.",
    "Write one request to put facts of the text above into a given form, for instance a list or JSON.",
    "Write one message of a person who has a practical problem that the text above helps with.",
    "Write one open question that makes a reader think further about the text above.",
)
"""Five kinds of seed instruction: facts, summaries, structure, uses, and thinking further."""
_CHAT = Task(name="self-study", messages="messages", metrics=("exact_match",))
_PLAIN = Task(name="self-study", template="{text}\nMessage:", target="answer", metrics=("exact_match",))
_CHUNK, _BATCH, _TOKENS, _NO_LIMIT = 2000, 16, 48, 1_000_000_000
"""Characters of a part of the context; queries written at once; tokens of a query; a limit that no input reaches."""
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)
_ROUNDS = 4
"""Attempts for each query asked for, since some are empty or repeated."""


def write_queries(model: PromptedModel, context: str, count: int, seed: int, *, chat: bool) -> list[str]:
    """Up to `count` different queries of one line, each about a part of the context.

    A part begins at one of its lines; in a line that is longer than a part, also where the part before it ends.

    The model reads the part and one of five instructions, and writes what a user might send (sampled, with the seed).
    Instructions come in turn, so that each kind has its share. There are fewer queries if the model repeats itself.

    Args:
        model: the backbone without a prompt.
        chat: write them through the backbone's chat template, else as the continuation of a text.

    Raises:
        ValueError: the model writes no query, or has no room for the instruction and a part of the context.

    Reference: Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context representations via
        self-study", section 4: seed prompts, chunks, and both sides of a conversation by the same model.
    Differs: one turn of questions; the answers are the teacher's, who reads the full context.
    """
    draw, queries = random.Random(f"self-study:{seed}"), dict[str, None]()
    for number in range(-(-count * _ROUNDS // _BATCH)):
        kinds = [INSTRUCTIONS[(number * _BATCH + row) % len(INSTRUCTIONS)] for row in range(min(_BATCH, count))]
        rows = _rows(model, context, kinds, draw, chat=chat)
        sampling = dataclasses.replace(_SAMPLING, seed=draw.randrange(2**31))
        for text in _continue(model, rows, sampling, chat=chat):
            if line := next((line.strip() for line in text.splitlines() if line.strip()), ""):
                queries.setdefault(line)
        if len(queries) >= count:
            break
    if not queries:
        raise ValueError(
            f"{model.backbone.source} wrote no question about the context; give queries, or use a backbone that is "
            "trained to chat"
        )
    return list(queries)[:count]


def _rows(
    model: PromptedModel, context: str, kinds: Sequence[str], draw: random.Random, *, chat: bool
) -> list[Mapping[str, Any]]:
    """An instruction after a part of the context, for each kind; the parts are short enough for the model."""
    drawn, size = [draw.random() for _ in kinds], _CHUNK
    while size:
        starts = _starts(context, size)
        offsets = [starts[int(share * len(starts))] for share in drawn]
        texts = [
            context[start : start + size].strip() + SEPARATOR + kind for start, kind in zip(offsets, kinds, strict=True)
        ]
        rows: list[Mapping[str, Any]] = [
            {"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in texts
        ]
        limit = model.max_row
        if limit is None or max(map(len, _ids(model, rows, chat=chat))) + _TOKENS <= limit:
            return rows
        size //= 2
    raise ValueError(
        f"{model.backbone.source} has {limit} positions, which leave no room for a question about the context; give "
        "queries"
    )


def _starts(context: str, size: int) -> list[int]:
    """Where a part of `size` characters may begin: at every line, and in a longer line every `size` characters."""
    starts, line_start = list[int](), 0
    for line in context.rstrip().split("\n"):
        starts += range(line_start, line_start + max(len(line), 1), size)
        line_start += len(line) + 1
    return starts


def _ids(model: PromptedModel, rows: Sequence[Mapping[str, Any]], *, chat: bool) -> list[tuple[int, ...]]:
    task = _CHAT if chat else _PLAIN
    examples = encode(task, model.backbone.tokenizer, rows, _NO_LIMIT, appends_eos=model.appends_eos, answers=False)[0]
    return [example.input_ids for example in examples]


def _continue(model: PromptedModel, rows: Sequence[Mapping[str, Any]], sampling: Sampling, *, chat: bool) -> list[str]:
    task, tokenizer = _CHAT if chat else _PLAIN, model.backbone.tokenizer
    examples = encode(task, tokenizer, rows, _NO_LIMIT, appends_eos=model.appends_eos, answers=False)[0]
    batch = collate(examples, pad_id=pad_id(model.backbone), side="left", with_answers=False)
    steps = model.generate(*batch.inputs(model.backbone.device), max_new_tokens=_TOKENS, sampling=sampling)
    rows, ends = torch.stack(list(steps), 1).tolist(), model.end_of_sequence()
    return [tokenizer.decode(before_end(row, ends), skip_special_tokens=True) for row in rows]
