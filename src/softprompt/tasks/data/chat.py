"""Tokenization of conversations by the backbone's own chat template, as the service lays them out too."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from softprompt.tasks.conversation import Message, answered_turns, split_answer, without_answer
from softprompt.tasks.data.control_tokens import Tokenizer
from softprompt.tasks.data.examples import Examples
from softprompt.tasks.data.tabular import records, row_name, row_number, row_origin
from softprompt.tasks.task import Task

Ids = tuple[int, ...]


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    to_answer: bool = True,
    where: str = "the messages",
    source: str = "",
) -> Ids:
    """The tokens of a conversation in the tokenizer's chat template.

    Only the template writes control tokens; their names in a message are plain text.

    Args:
        to_answer: end with what the template writes before the assistant's next message.
        where: the conversation's name in errors.
        source: the backbone's name in errors; empty for the tokenizer's folder.

    Raises:
        ValueError: the template rejects the conversation.
    """
    try:
        encoding = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=to_answer,
            sanitize_control_tokens=True,
            return_dict=True,
        )
    except ImportError:
        raise
    except Exception as error:  # a template is a program by the model's author and may raise anything
        name = source or _source(tokenizer)
        raise ValueError(f"the chat template of {name} rejects {where}: {error}") from error
    return tuple(encoding["input_ids"])


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Check that there is a chat template.

    Raises:
        ValueError: there is none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{_source(tokenizer)} has no chat template, which chat messages need; use a chat model (often named "
            "Instruct or Chat), put a chat_template.jinja into the backbone's folder, or use a task with a template"
        )


def encode_chats(
    task: Task,
    tokenizer: Tokenizer,
    rows: Iterable[Mapping[str, Any]],
    max_input_tokens: int,
    *,
    appends_eos: bool,
    answers: bool,
) -> Examples:
    """Tokenize conversations in order: the input is everything before the assistant's last message.

    The answer is what the chat template writes for that message, up to the control token that ends it; a line break
    after that is never generated. A conversation is not truncated.

    Args:
        appends_eos: the backbone reads an input's closing tokens, so it is not a decoder.
        answers: read the answers; False: a row may end with any message, and the assistant's last one is not read.

    Raises:
        ValueError: no chat template, or one that lays the input out differently once it is answered; a backbone that
            is not a decoder; or a row without an answer, or longer than `max_input_tokens`.
    """
    if appends_eos:
        raise ValueError(f"task {task.name!r} has chat messages, but the backbone is not a decoder; use a chat model")
    check_chat_template(tokenizer)
    special = {int(index) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    examples = Examples(row_origin(rows))
    for index, row in enumerate(records(rows)):
        where = row_name(rows, row, index)
        messages = task.conversation(row, where)
        before = split_answer(messages, task.messages, where)[0] if answers else without_answer(messages)
        ids = chat_ids(tokenizer, before, where=where)
        if len(ids) > max_input_tokens:
            raise ValueError(
                f"{where} has {len(ids)} tokens before the answer, but the limit is {max_input_tokens}; raise "
                "max_input_tokens as far as the backbone allows, or shorten the conversation, which is not truncated"
            )
        answer_ids = _answer_ids(tokenizer, messages, ids, special, where) if answers else ()
        examples.append(ids, answer_ids, None, row_number(row, len(examples)))
    return examples


def _answer_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], ids: Ids, special: set[int], where: str
) -> tuple[int, ...]:
    full = chat_ids(tokenizer, messages, to_answer=False, where=where)
    if full[: len(ids)] != ids:
        raise ValueError(
            f"the chat template of {_source(tokenizer)} lays {where} out differently once it is answered, so what the "
            "prompt would be trained on is not what the model is asked; take white space from the answer's beginning, "
            "or use a template whose text for a conversation begins with the one for its question"
        )
    answer = full[len(ids) :]
    if not answer:
        raise ValueError(
            f"the chat template of {_source(tokenizer)} leaves the answer of {where} out; use a template that writes "
            "the assistant's messages"
        )
    end = max((position for position, token in enumerate(answer) if token in special), default=-1) + 1
    only_space = end and not tokenizer.decode(list(answer[end:])).strip()
    return answer[:end] if only_space else answer


def with_answered_turns(task: Task, rows: Dataset) -> Dataset:
    """Training rows: for `assistant_turns = "all"`, one per assistant's message, which keeps its conversation's number.

    The rows of other tasks are returned as they are.
    """
    if not task.messages or task.assistant_turns == "last":
        return rows
    indices, cells = list[int](), list[str]()
    for index, row in enumerate(records(rows)):
        for messages in answered_turns(task.conversation(row, row_name(rows, row, index))):
            indices.append(index)
            cells.append(json.dumps(messages, ensure_ascii=False))
    result = Dataset.from_dict({**rows.select(indices).to_dict(), task.messages: cells})
    result.info.dataset_name = rows.info.dataset_name
    return result


def encode_system_message(tokenizer: Tokenizer, text: str) -> tuple[Ids, int, int, Ids]:
    """The tokens that a system message puts in front of a conversation.

    Returns:
        These tokens; how many of them come before the message's text, and how many after it; and the tokens with which
        a conversation without a system message begins instead.

    Raises:
        ValueError: no chat template, or one that rejects a system message or leaves it out.
    """
    check_chat_template(tokenizer)
    where = "the context as a system message"
    question = [{"role": "user", "content": "x"}]
    bare = chat_ids(tokenizer, question, where=where)

    # Another text has the same header and closing, and no other token in common at its ends.
    other_text = next(char for char in "xyz" if char not in (text[0], text[-1]))
    ids, other = (
        chat_ids(tokenizer, [{"role": "system", "content": content}, *question], where=where)
        for content in (text, other_text)
    )
    same = min(_common(ids_of[::-1], bare[::-1]) for ids_of in (ids, other))
    ids, other, replaced = ids[: len(ids) - same], other[: len(other) - same], bare[: len(bare) - same]
    if ids == other:
        raise ValueError(
            f"the chat template of {_source(tokenizer)} leaves system messages out, so the context would not be read; "
            "use another backbone, or a template that writes them"
        )
    before = _common(ids, other)
    after = min(_common(ids[::-1], other[::-1]), len(ids) - before, len(other) - before)
    return ids, before, after, replaced


def check_context_layout(
    task: Task, tokenizer: Tokenizer, rows: Dataset | Sequence[Mapping[str, Any]], examples: Any, text: str
) -> None:
    """Check that a system message of `text` changes nothing in the conversations but their beginning.

    Args:
        examples: `rows`, tokenized without it.

    Raises:
        ValueError: a row that has a system message itself, or that the chat template lays out differently otherwise.
    """
    ids, _, _, replaced = encode_system_message(tokenizer, text)
    for example in examples:
        before = without_answer(task.conversation(rows[example.row], example.where))
        if before[0]["role"] == "system":
            raise ValueError(
                f"{example.where} has a system message, but the context to distil becomes the system message; take it "
                "out of the row, or write it into the context"
            )
        system = {"role": "system", "content": text}
        expected = chat_ids(tokenizer, [system, *before], where=example.where)
        if example.input_ids[: len(replaced)] != replaced or ids + example.input_ids[len(replaced) :] != expected:
            raise ValueError(
                f"the chat template of {_source(tokenizer)} lays {example.where} out differently after a system "
                "message, so a prompt cannot be compared with the context; use a template that writes system messages "
                "as turns of their own, or a task with a template"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _source(tokenizer: Tokenizer) -> str:
    """The tokenizer's folder, without its path."""
    return Path(str(getattr(tokenizer, "name_or_path", ""))).name or "the tokenizer"
