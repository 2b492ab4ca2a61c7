"""SuperGLUE and GLUE: the texts and answers of every wording are the recorded ones."""

import json
from pathlib import Path

import pytest
from official_files import DIAGNOSTIC, GLUE, GOLDEN, SUPERGLUE, write_glue, write_superglue

from softprompt.tasks import READERS, TASKS
from softprompt.tasks.builtin import official
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task


@pytest.mark.parametrize("name", [*SUPERGLUE, *GLUE])
def test_wordings_render_the_recorded_texts(name: str, tmp_path: Path) -> None:
    """Three rows in three wordings, letter by letter, beside the answer."""
    folder = write_superglue(tmp_path, 1) if name in SUPERGLUE else write_glue(tmp_path, 1)
    task = TASKS[name]
    rows = READERS[task.source](task, folder)["test" if name in DIAGNOSTIC else "train"]
    result = [
        [
            wording,
            worded.render(row),
            worded.answers[worded.answer(row)] if worded.label_words else list(worded.golds(row)),
        ]
        for wording in ("natural", "dpt", "residual")
        for worded in [load_task(f"{name}:{wording}")]
        for row in rows
    ]
    assert result == json.loads((GOLDEN / "texts.json").read_text())[name]
    assert task == task.using("natural")


def test_only_published_copa_omits_the_question() -> None:
    row = {"premise": "It rained.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    texts = {wording: load_task(f"copa:{wording}").render(row) for wording in ("natural", "dpt", "residual")}
    assert [wording for wording, text in texts.items() if "cause" not in text] == ["dpt"]


def test_wsc_positives_has_one_label(superglue: Path) -> None:
    both, positives = splits(TASKS["wsc"], str(superglue)), splits(TASKS["wsc-positives"], str(superglue))
    assert set(both.train["label"]) == {True, False}
    assert set(positives.train["label"]) == {True}
    assert len(positives.train) == sum(both.train["label"])


def test_wsc_spans_are_located_and_marked() -> None:
    row = {
        "text": "They might use it , and their mothers too.",
        "target": {"span1_index": 5, "span1_text": "their mothers", "span2_index": 5, "span2_text": "Their"},
        "label": False,
    }
    read = TASKS["wsc"], READERS["wsc"]
    assert isinstance(read[1], official.Official)
    (flat,) = read[1].flatten(row)
    (built,) = read[1].preprocess(flat)
    assert built["both_marked"] == "They might use it , and * # their # mothers * too."
    (moved,) = read[1].preprocess({**flat, "span2_text": "it", "span2_index": 2})
    assert moved["pronoun_marked"] == "They might use *it* , and their mothers too."
    with pytest.raises(ValueError, match="the span 'her' is not in its text"):
        list(read[1].preprocess({**flat, "span2_text": "her"}))
