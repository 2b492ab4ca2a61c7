"""Conversations: a cell of chat messages in OpenAI's format, checked and in one form."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt.tasks.template import check_characters

Message = dict[str, str]
"""The `role` (system, user or assistant) and the `content`, a text."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_IGNORED = ("role", "content", "name")
"""Fields that a message may have; as in the service, the name has no effect."""
_EXAMPLE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def read_messages(value: Any, column: str, where: str) -> list[Message]:
    """Check a conversation and return its messages; content in parts of type text is joined.

    Args:
        value: the cell: a list of messages, or JSON text of one.
        column: the cell's column, for errors.
        where: the row's name, for errors.

    Raises:
        ValueError: no list of messages, or none from the user; an unknown role or field; content that is not text or
            has none; a system message that is not the first message, or a second one.

    >>> read_messages('[{"role": "user", "content": "hi"}]', "messages", "row 1")
    [{'role': 'user', 'content': 'hi'}]
    """
    messages = _list(value, column, where)
    if not messages:
        raise ValueError(f"{where} has no message in column {column!r}; give it one or leave the row out")
    read = [
        _message(message, column, f"message {number} of {where}") for number, message in enumerate(messages, start=1)
    ]
    systems = [index for index, message in enumerate(read) if message["role"] == "system"]
    if len(systems) > 1:
        raise ValueError(f"{where} has {len(systems)} system messages in column {column!r}; make them one, the first")
    if systems and systems[0]:
        raise ValueError(
            f"message {systems[0] + 1} of {where} is a system message in column {column!r}; a conversation can only "
            "begin with one"
        )
    if not any(message["role"] == "user" for message in read):
        raise ValueError(f"{where} has no message from the user in column {column!r}; give it one or leave the row out")
    return read


def split_answer(messages: Sequence[Message], column: str, where: str) -> tuple[list[Message], str]:
    """Split a conversation into the messages before its last one, and that one's text, the assistant's answer.

    Raises:
        ValueError: the last message is not from the assistant.
    """
    *before, last = messages
    if last["role"] != "assistant":
        raise ValueError(
            f"the last message of {where} is from the {last['role']} in column {column!r}; end the conversation with "
            "the assistant's answer, or leave the row out"
        )
    return before, last["content"]


def without_answer(messages: Sequence[Message]) -> list[Message]:
    """The conversation to answer: without the assistant's last message if it ends with one."""
    return list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def answered_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation up to each assistant's message that follows one of the user's."""
    roles = [message["role"] for message in messages]
    return [
        list(messages[: index + 1])
        for index, role in enumerate(roles)
        if role == "assistant" and "user" in roles[:index]
    ]


def as_text(messages: Sequence[Message]) -> str:
    """The conversation for a reader: a line per message, beginning with its role."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _list(value: Any, column: str, where: str) -> list[Any]:
    value = _without_arrays(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where} has no value in column {column!r}; give it a list of messages, as {_EXAMPLE}")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{where} has text in column {column!r} that is not JSON ({error}); a list of messages belongs there, "
                f"as {_EXAMPLE}"
            ) from None
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{where} has a {type(value).__name__} in column {column!r}; a list of messages belongs there, as "
            f"{_EXAMPLE}"
        )
    return list(value)


def _message(message: Any, column: str, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where} is a {type(message).__name__} in column {column!r}; an object with role and content belongs there"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"{where} has the role {role!r} in column {column!r}; known are {', '.join(_ROLES)}")
    # Tables fill in null, and clients an empty list, for a field that only other messages have.
    if unknown := [
        name for name in message if name not in _IGNORED and _without_arrays(message[name]) not in (None, [], {})
    ]:
        raise ValueError(
            f"{where} has the field {unknown[0]!r} in column {column!r}, which is not supported; leave it out"
        )
    text = _content(message.get("content"), column, where)
    check_characters(text, column, where)
    if not text.strip():
        raise ValueError(
            f"{where}, from the {role}, has no text in column {column!r}; give it some, or leave the message out"
        )
    return {"role": _ROLES[role], "content": text}


def _without_arrays(value: Any) -> Any:
    """The value as a list if it is an array, as which pandas reads the lists of a Parquet file."""
    return value.tolist() if callable(getattr(value, "tolist", None)) else value


def _content(content: Any, column: str, where: str) -> str:
    content = _without_arrays(content)
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{where} has a {type(content).__name__} as content in column {column!r}; text or a list of text parts "
            "belongs there"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where} has a content part of type {kind!r} in column {column!r}; only parts of type text are "
                "supported"
            )
    return "".join(part["text"] for part in content)
