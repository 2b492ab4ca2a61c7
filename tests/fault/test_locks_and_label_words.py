"""Two processes on one run, and a label word that is the beginning of another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from softprompt import files
from softprompt.tasks import Task
from softprompt.tasks.data.tokenize import answer_ids


def test_folder_lock_is_exclusive(tmp_path: Path) -> None:
    with files.locked(tmp_path), pytest.raises(BlockingIOError, match="another process"), files.locked(tmp_path):
        pass
    with files.locked(tmp_path):
        pass


class WordTokenizer:
    """A word-level tokenizer; a label word could never win against its own beginning."""

    is_fast, unk_token_id, eos_token = True, -1, None
    known: tuple[str, ...] = (":", "spam", "offer", "ham")
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __len__(self) -> int:
        return len(self.known)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.known.index(word) for word in text.replace(":", ": ").split()] for text in texts]}


def test_label_word_that_begins_another_is_refused() -> None:
    overlapping = {"a": "spam", "b": "spam offer"}
    task = Task(name="mail", template="{text}\nKind:", label="kind", label_words=overlapping)
    with pytest.raises(ValueError, match="is a prefix of the other"):
        answer_ids(task, WordTokenizer())
    valid = Task(name="mail", template="{text}\nKind:", label="kind", label_words={"a": "ham", "b": "spam offer"})
    assert answer_ids(valid, WordTokenizer()) == ((3,), (1, 2))
