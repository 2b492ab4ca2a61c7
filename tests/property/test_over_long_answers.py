"""Gold answers longer than max_new_tokens are counted, since they can never be right."""

import pytest

from softprompt.evaluation.predict import over_long_answers, over_long_note
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example
from softprompt.tasks.data.tokenize import encode


def test_answers_are_counted_without_their_end() -> None:
    examples = [Example((1,), tuple(range(length + 1)), None, length) for length in range(1, 9)]
    assert [over_long_answers(examples, most) for most in (8, 7, 5, 1)] == [0, 1, 3, 7]
    assert over_long_note(examples, 8, "train") is None
    note = over_long_note(examples, 5, "dev")
    assert note is not None
    assert note.startswith("3 of 8 dev answers are longer than 5 tokens")
    assert note.endswith("give --max-new-tokens 8")


def test_labels_have_no_length_limit() -> None:
    assert over_long_answers([Example((1,), (1,) * 50, 0, 0)], 5) == 0


@pytest.mark.parametrize("count", [1, 3, 9])
def test_exact_limit_is_enough(tokenizer, count: int) -> None:
    task = Task(name="t", template="{a}", target="y", metrics=("exact_match",))
    rows = [{"a": "x", "y": "abc " * count}]
    [example] = encode(task, tokenizer, rows, 20)[0]
    needed = len(tokenizer(" " + rows[0]["y"], add_special_tokens=False)["input_ids"])
    assert over_long_answers([example], needed) == 0
    assert over_long_answers([example], needed - 1) == 1
