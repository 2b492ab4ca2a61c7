"""What a user reads of an error: one line, after the class's name where the message alone would say nothing."""

import pytest

from softprompt import files
from softprompt.serve.engine.request import PromptNotFound


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(" "), "ValueError: no message"),
        (KeyError("rows"), "KeyError: 'rows'"),
        (IndexError(), "IndexError: no message"),
        (PromptNotFound("there is no prompt 'x'"), "there is no prompt 'x'"),  # a LookupError, and ours
    ],
)
def test_one_line_names_the_class_of_an_unreadable_error(error: Exception, line: str) -> None:
    assert files.one_line(error) == line
    assert files.is_readable(error) == (not line.startswith(type(error).__name__))


def test_error_text_is_the_message_or_the_class() -> None:
    assert files.error_text(KeyError("rows")) == "'rows'"
    assert files.error_text(TimeoutError()) == "TimeoutError"


def test_first_line_leaves_another_librarys_advice_out() -> None:
    assert files.first_line(OSError("\n it failed.\nPass trust_remote_code=True")) == "it failed"
    assert files.first_line(ValueError()) == "ValueError"
    assert len(files.first_line("x" * 999)) == 300
