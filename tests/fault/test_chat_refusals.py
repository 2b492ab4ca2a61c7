"""Chats and contexts that cannot be used are refused in one sentence, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import Backbone, Experiment, Plain, TrainingConfig, load_backbone, predict, train
from softprompt.tasks import Task
from softprompt.tasks.data.splits import splits
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.user import load_task
from softprompt.training.distil import distil

USER, ANSWER, SYSTEM = ({"role": role, "content": "a b"} for role in ("user", "assistant", "system"))
IMAGE = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]}
TASK = Task(name="chat", messages="messages", metrics=("exact_match",))


@pytest.fixture(scope="module")
def backbone(chat_folder: Path) -> Backbone:
    return load_backbone(str(chat_folder), dtype="float32")


def write(folder: Path, cell: Any, **settings: Any) -> Path:
    """A chat task of eight conversations and this one, the second."""
    cells = [[USER, ANSWER], cell, *[[USER, ANSWER]] * 7]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": cell}) + "\n" for cell in cells))
    lines = {"train": "rows.jsonl", "messages": "messages", **settings}
    (folder / "chat.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    return folder / "chat.toml"


def experiment(backbone: Backbone, task: Path | str, **settings: Any) -> Experiment:
    training = TrainingConfig(steps=1, batch_size=2, eval_steps=1, max_new_tokens=4, **settings.pop("training", {}))
    return Experiment(
        backbone=backbone.source, task=str(task), prompt=Plain(length=2), training=training, dtype="float32", **settings
    )


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([SYSTEM, SYSTEM, USER, ANSWER], "row 2 of .* has 2 system messages"),
        ([SYSTEM, {**SYSTEM, "role": "developer"}, USER, ANSWER], "row 2 of .* has 2 system messages"),
        ([USER, SYSTEM, ANSWER], "message 2 of row 2 of .* is a system message .* can only begin with one"),
        ([{**USER, "role": "tool"}, ANSWER], "message 1 of row 2 of .* the role 'tool' .* known are system"),
        ([{"content": "a"}, ANSWER], "message 1 of row 2 of .* the role None"),
        ([IMAGE, ANSWER], "message 1 of row 2 of .* content part of type 'image_url' .* only parts of type text"),
        ([{**USER, "content": {"text": "a"}}, ANSWER], "message 1 of row 2 of .* has a dict as content"),
        ([USER, {**ANSWER, "tool_calls": [{"id": "1"}]}], "message 2 of row 2 of .* the field 'tool_calls'"),
        ([USER, ANSWER, USER], "the last message of row 2 of .* is from the user .* end the conversation with"),
        ([SYSTEM, ANSWER], "row 2 of .* has no message from the user"),
        ([], "row 2 of .* has no message in column 'messages'"),
        (None, "row 2 of .* has no value in column 'messages'"),
        ([{**USER, "content": " "}, ANSWER], "message 1 of row 2 of .*, from the user, has no text"),
        ([USER, {**ANSWER, "content": None}], "message 2 of row 2 of .*, from the assistant, has no text"),
        (["a", "b"], "message 1 of row 2 of .* is a str .* an object with role and content"),
        ({"role": "user"}, "row 2 of .* has a str|dict in column 'messages'; a list of messages"),
        ("hello", "row 2 of .* text in column 'messages' that is not JSON"),
        ("5", "row 2 of .* has a int in column 'messages'; a list of messages"),
        ('[{"role": "user", "content": "\\ud83d"}]', r"message 1 of row 2 of .* has half a character"),
    ],
)
def test_unusable_conversation_is_refused(cell: Any, message: str, backbone: Backbone, tmp_path: Path) -> None:
    task = write(tmp_path, cell)
    with pytest.raises(ValueError, match=message) as error:
        train(experiment(backbone, task), out=tmp_path / "runs", backbone=backbone)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "cell",
    [
        [USER, USER, ANSWER],
        [{**USER, "content": [{"type": "text", "text": "a"}]}, {**ANSWER, "tool_calls": [], "name": None}],
        json.dumps([{**SYSTEM, "role": "developer"}, USER, ANSWER]),
    ],
)
def test_unusual_conversation_is_accepted(cell: Any, backbone: Backbone, tmp_path: Path) -> None:
    task = load_task(str(write(tmp_path, cell)))
    rows = splits(task)
    assert sum(len(encode(task, backbone.tokenizer, table, 100)[0]) for table in (rows.train, rows.dev, rows.test)) == 9


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "tiny-chat has no chat template, .* use a chat model"),
        (
            "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>think{% endif %}",
            "lays row 1 of .* out differently once it is answered",
        ),
        (
            "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}",
            "ends the answer of row 1 of .* with",
        ),
        (
            "{% if messages | length > 1 and messages[0].role == messages[1].role %}"
            "{{ raise_exception('roles must alternate') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "the chat template of tiny-chat rejects row 2 of .*: roles must alternate",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}",
            "the chat template of tiny-chat leaves the answer of row 1 of .* out",
        ),
    ],
    ids=["none", "other prefix", "no end", "rejects", "no answer"],
)
def test_unusable_template_is_refused(template: str | None, message: str, chat_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(chat_folder), dtype="float32")
    backbone.tokenizer.chat_template = template
    task = write(tmp_path, [USER, USER, ANSWER])
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(rows[:-1]))
    task.write_text(task.read_text() + 'test = "test.jsonl"\ndev = "test.jsonl"\n')
    with pytest.raises(ValueError, match=message):
        train(experiment(backbone, task), out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{a}"}, "has messages and the template '{a}'"),
        ({"target": "a"}, "has messages and the target 'a'"),
        ({"label": "a"}, "has messages and the label"),
        ({"assistant_turns": "first"}, "assistant_turns of task 'chat' is 'first'; it must be 'all' or 'last'"),
        ({"assistant_turns": 2}, "assistant_turns in .* is 2; write text"),
        ({"messages": "chat"}, "has no column 'chat'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_contradictory_task_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        splits(load_task(str(write(tmp_path, [USER, ANSWER], **settings))))


def test_long_conversation_is_not_truncated(backbone: Backbone, tmp_path: Path) -> None:
    task = write(tmp_path, [{**USER, "content": "a b " * 40}, ANSWER])
    with pytest.raises(ValueError, match=r"has \d+ tokens before the answer, but the limit is 60; raise"):
        train(experiment(backbone, task, training={"max_input_tokens": 60}), out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


def test_other_architectures_and_demonstrations_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the backbone is not a decoder"):
        encode(TASK, backbone.tokenizer, [{"messages": [USER, ANSWER]}], 100, appends_eos=True)
    task = write(tmp_path, [USER, ANSWER])
    with pytest.raises(ValueError, match="has chat messages, but demonstrations are rows of a template"):
        train(experiment(backbone, task, demonstrations=2), out=tmp_path / "runs", backbone=backbone)


@pytest.mark.parametrize(
    ("cell", "context", "template", "message"),
    [
        ([SYSTEM, USER, ANSWER], "a b", "", "row 2 of .* has a system message, but the context to distil becomes"),
        ([USER, ANSWER], "", "", "has no text"),
        ([USER, ANSWER], "\ufeff \n\t", "", "has no text"),
        ([USER, ANSWER], "<s> </s>\n<pad>", "", "consists of control tokens of .*; give a text"),
        (
            [USER, ANSWER],
            "a b",
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}</s>{% endif %}{% endfor %}",
            "leaves system messages out",
        ),
        (
            [USER, ANSWER],
            "a b",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "rejects the context as a system message: no system role",
        ),
        (
            [USER, {**ANSWER, "content": "c"}, USER, ANSWER],
            "a b",
            "{% set system = messages[0].role == 'system' %}"
            "{% for m in messages %}<s>{{ m.content }}{% if system and loop.index0 > 1 %} {% endif %}</s>{% endfor %}",
            "lays row 2 of .* out differently after a system message",
        ),
    ],
    ids=["own system", "empty", "white space", "control tokens", "left out", "rejected", "other layout"],
)
def test_unusable_context_of_a_chat_is_refused(
    cell: Any, context: str, template: str, message: str, chat_folder: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(str(chat_folder), dtype="float32")
    backbone.tokenizer.chat_template = template or backbone.tokenizer.chat_template
    (tmp_path / "context.md").write_text(context, encoding="utf-8")
    asked = experiment(backbone, write(tmp_path, cell, assistant_turns="last"), context=str(tmp_path / "context.md"))
    with pytest.raises(ValueError, match=message):
        train(asked, out=tmp_path / "runs", backbone=backbone)
    with pytest.raises(ValueError, match=message.replace("row 2 of .*", "row 2")):
        distil(asked, tmp_path / "rows.jsonl", messages="messages", out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"template": "{question}"}, "has no column 'question' for the template"),
        ({"messages": "chat"}, "has no column 'chat' for the messages"),
        ({"template": "{question}", "messages": "chat"}, "distil has both of template and messages"),
        ({}, "distil has neither of template and messages"),
        ({"messages": "messages", "queries": None}, "self_study is 0 and there are no queries; give a table"),
        ({"messages": "messages", "self_study": -1}, "self_study is -1 and there are queries; give a table"),
        ({"template": "{a} {b}", "self_study": 4}, "the template '{a} {b}' has 2 columns; a written query fills one"),
    ],
)
def test_queries_without_their_column_are_refused(
    layout: dict[str, Any], message: str, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "context.md").write_text("a b")
    asked = experiment(backbone, write(tmp_path, [USER]), context=str(tmp_path / "context.md"))
    with pytest.raises(ValueError, match=message):
        distil(asked, **{"queries": tmp_path / "rows.jsonl", **layout}, out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("layout", [{"template": "Ticket: {text}"}, {"messages": "messages"}])
def test_silent_teacher_is_refused(layout: dict[str, str], chat_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(chat_folder), dtype="float32")
    with torch.no_grad():
        backbone.model.lm_head.weight.zero_()  # the most likely token is the first, <s>, which is no text
    (tmp_path / "context.md").write_text("a b")
    rows = [{"text": "a", "messages": [USER]}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = experiment(backbone, "sentiment", context=str(tmp_path / "context.md"))
    with pytest.raises(ValueError, match="the model wrote nothing for any of the 4 queries"):
        distil(asked, tmp_path / "rows.jsonl", **layout, out=tmp_path / "runs", backbone=backbone)
    assert not (tmp_path / "runs").exists()


def test_predicted_rows_are_checked_too(backbone: Backbone, tmp_path: Path) -> None:
    run = train(experiment(backbone, write(tmp_path, [USER, ANSWER])), out=tmp_path / "runs", backbone=backbone)
    for rows, message in (
        ([{"messages": [SYSTEM]}], "row 1 has no message from the user"),
        ([{"messages": [USER]}, {"messages": []}], "row 2 has no message in column"),
        ([[USER]], "row 1 is .*; give a list of rows, each a dict with the column 'messages'"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(run, rows, backbone=backbone)
