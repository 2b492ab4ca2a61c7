"""Conversations are trained, resumed, evaluated and distilled like other rows."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt import (
    Backbone,
    Experiment,
    Interrupted,
    Plain,
    Progress,
    TrainingConfig,
    evaluate,
    load_backbone,
    resume,
    train,
)
from softprompt.models import attach
from softprompt.tasks.data.chat import with_answered_turns
from softprompt.tasks.data.splits import splits
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.user import load_task
from softprompt.training import self_study
from softprompt.training.callbacks import NullCallback
from softprompt.training.distil import distil

WriteTask = Callable[..., Path]
SETTINGS = TrainingConfig(steps=30, batch_size=4, eval_steps=15, lr=0.3, max_new_tokens=4)


def conversation(number: int) -> list[dict[str, str]]:
    """Two turns, whose answers are the letters of their questions."""
    first, second = "abcdef"[number % 6], "abcdef"[number % 5]
    texts = [("user", f"{first} {number}"), ("assistant", first), ("user", second), ("assistant", f"{second} {second}")]
    return [{"role": role, "content": text} for role, text in texts]


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """`write_task(assistant_turns="last")`: the TOML file of a task of 30 conversations."""

    def write(**settings: str) -> Path:
        rows = [{"messages": conversation(number)} for number in range(30)]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"train": "chats.jsonl", "messages": "messages", **settings}
        file = tmp_path / "chats.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        return file

    return write


@pytest.fixture(scope="module")
def backbone(chat_folder: Path) -> Backbone:
    return load_backbone(str(chat_folder), dtype="float32")


def experiment(chat_folder: Path, task: Path, **settings: Any) -> Experiment:
    return Experiment(
        backbone=str(chat_folder),
        task=str(task),
        **{"prompt": Plain(length=6), "training": SETTINGS, "dtype": "float32", **settings},
    )


def test_every_answered_turn_is_a_training_row(write_task: WriteTask, backbone: Backbone) -> None:
    task = load_task(str(write_task()))
    rows = splits(task).train
    turns = with_answered_turns(task, rows)
    assert len(turns) == 2 * len(rows)
    examples, plain = (encode(task, backbone.tokenizer, table, 500)[0] for table in (turns, rows))
    assert examples[1].input_ids == plain[0].input_ids
    assert examples[1].answer_ids == plain[0].answer_ids
    first_answer = json.loads(rows[0]["messages"])[1]["content"]
    assert backbone.tokenizer.decode(examples[0].answer_ids) == f"{first_answer}</s>"
    assert [example.where for example in examples[:2]] == [plain[0].where] * 2
    last = load_task(str(write_task(assistant_turns="last")))
    assert with_answered_turns(last, rows) is rows


def test_greeting_of_the_assistant_is_read_and_not_trained_on(write_task: WriteTask, tmp_path: Path) -> None:
    file = write_task()
    greeting = {"role": "assistant", "content": "hello"}
    rows = [{"messages": [greeting, *conversation(number)]} for number in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(file))
    rows_of_task = splits(task).train
    turns = with_answered_turns(task, rows_of_task)
    assert len(turns) == 2 * len(rows_of_task)
    assert all(json.loads(cell)[0] == greeting for cell in turns["messages"][:])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_conversations_are_read_from_every_kind_of_table(
    kind: str, write_task: WriteTask, tmp_path: Path, backbone: Backbone
) -> None:
    from datasets import Dataset

    file = write_task(train=f"chats.{kind}" if kind != "jsonl" else "chats.jsonl")
    cells = [conversation(number) for number in range(30)]
    if kind == "csv":
        Dataset.from_dict({"messages": list(map(json.dumps, cells))}).to_csv(tmp_path / "chats.csv")
    elif kind == "parquet":
        # Rows of one column have the same fields there: those of the others are null.
        cells[0][0]["name"] = "someone"
        Dataset.from_dict({"messages": cells}).to_parquet(tmp_path / "chats.parquet")
    task = load_task(str(file))
    examples = encode(task, backbone.tokenizer, splits(task).test, 500)[0]
    expected = encode(task, backbone.tokenizer, splits(load_task(str(write_task()))).test, 500)[0]
    assert list(examples) == [
        # The name of the file is part of a row's name.
        example.__class__(**{**vars(example), "where": found.where})
        for example, found in zip(expected, examples, strict=True)
    ]


def test_chat_run_learns_resumes_and_is_evaluated(
    write_task: WriteTask, chat_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    class Stop(NullCallback):
        def on_step(self, progress: Progress) -> None:
            if progress.step == 20:
                raise KeyboardInterrupt

    asked = experiment(chat_folder, write_task())
    reference = train(asked, out=tmp_path / "runs", name="reference", backbone=backbone)
    losses = [line["loss"] for line in reference.metrics() if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(asked, out=tmp_path / "runs", name="stopped", backbone=backbone, callback=Stop())
    run = resume(tmp_path / "runs" / "stopped", backbone=backbone)
    for file in ("softprompt.safetensors", "predictions.jsonl"):
        assert (run.folder / file).read_bytes() == (reference.folder / file).read_bytes()
    score = evaluate(run, backbone=backbone)
    assert reference.results is not None
    assert score.value == reference.results["test"]
    assert score.n == 6


def test_context_of_a_chat_is_distilled(
    write_task: WriteTask, chat_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "context.md").write_text("answer a b c d with e f")
    asked = experiment(chat_folder, write_task(), context=str(tmp_path / "context.md"))
    run = train(asked, out=tmp_path / "runs", backbone=backbone)
    assert run.results is not None
    close = run.results["distillation"]
    assert close["teacher"]["kl"] == 0.0
    assert close["prompt"]["kl"] < 0.7 * close["no_context"]["kl"]
    assert {"context_start", "context_end"} <= set(close)


def test_chat_queries_are_answered_and_trained_on(chat_folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "context.md").write_text("a b c")
    # Half of them end with an answer, which is not read.
    rows = [{"chat": conversation(number)[: 3 + number % 2]} for number in range(24)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainingConfig(steps=2, batch_size=4, eval_steps=2, max_new_tokens=4)
    asked = experiment(
        chat_folder, tmp_path / "none.toml", context=str(tmp_path / "context.md"), training=settings
    ).replace(task="sentiment")
    for seed in (0, 1):
        run = distil(
            asked.replace(seed=seed),
            tmp_path / "requests.jsonl",
            messages="chat",
            out=tmp_path / "runs",
            backbone=backbone,
        )
        assert run.results is not None
        close = run.results["distillation"]
        assert close["teacher"]["score"] == close["teacher"]["agreement"] == 1.0  # float32: it repeats its own answers
    [folder] = (tmp_path / "runs").glob("teacher-*")
    answered = [json.loads(line)["chat"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert all(chat[-1]["role"] == "assistant" and len(chat) == 4 for chat in answered)
    written = tomllib.loads((folder / "task.toml").read_text())
    assert written["messages"] == "chat"
    assert written["assistant_turns"] == "last"


@pytest.mark.parametrize("layout", [{"messages": "messages"}, {"template": "Ticket: {text}\nQueue:"}])
def test_model_writes_its_own_queries(
    layout: dict[str, str], chat_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "rules.md").write_text("a b c\n\nd e f\n")
    settings = TrainingConfig(steps=2, batch_size=4, eval_steps=2, max_new_tokens=4)
    asked = experiment(chat_folder, tmp_path, context=str(tmp_path / "rules.md"), training=settings)
    asked = asked.replace(task="sentiment")
    written = []
    for out in ("first", "second"):
        run = distil(asked, None, **layout, self_study=20, out=tmp_path / out, backbone=backbone)
        [folder] = (tmp_path / out).glob("teacher-*")
        written.append((folder / "answers.jsonl").read_text())
        assert run.name.startswith("rules-")
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0].splitlines()]
    queries = [row["messages"][0]["content"] if "messages" in layout else row["text"] for row in rows]
    assert 10 < len(queries) == len(set(queries)) <= 20
    another = distil(asked.replace(seed=1), None, **layout, self_study=20, out=tmp_path / "first", backbone=backbone)
    assert another.task.files != run.task.files
    assert len(list((tmp_path / "first").glob("teacher-*"))) == 2


@pytest.mark.parametrize("chat", [True, False])
def test_written_queries_are_about_parts_of_the_context(
    chat: bool, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {number} of the rules" for number in range(200)]
    prompts: list[str] = []

    def answer(model: Any, rows: Any, sampling: Any, *, chat: bool) -> list[str]:
        texts = [row["messages"][0]["content"] if chat else row["text"] for row in rows]
        prompts.extend(texts)
        return [f"\nquery {len(prompts) + index}?\nand an answer" for index in range(len(texts))]

    monkeypatch.setattr(self_study, "_continue", answer)
    queries = self_study.write_queries(attach(backbone), "\n".join(lines), 20, 0, chat=chat)
    assert len(queries) == 20
    assert all(query.startswith("query ") and "answer" not in query for query in queries)
    parts, instructions = zip(*(prompt.rsplit("\n\n", 1) for prompt in prompts), strict=True)
    assert set(instructions) == set(self_study.INSTRUCTIONS)
    assert len({part[:9] for part in parts}) > 5
    assert all(part in "\n".join(lines) and part.startswith("line ") for part in parts)
    for prompt in prompts:
        rows = [{"messages": [{"role": "user", "content": prompt}]}] if chat else [{"text": prompt}]
        assert len(self_study._ids(attach(backbone), rows, chat=chat)[0]) <= 256 - 48


def test_written_queries_are_about_all_of_a_long_line(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    context = " ".join(f"rule {number}." for number in range(1000)) + "\n\nthe end\n"
    parts: list[str] = []

    def answer(model: Any, rows: Any, sampling: Any, *, chat: bool) -> list[str]:
        parts.extend(row["text"].rsplit("\n\n", 1)[0] for row in rows)
        return [f"query {len(parts) + index}" for index in range(len(rows))]

    monkeypatch.setattr(self_study, "_continue", answer)
    self_study.write_queries(attach(backbone), context, 1000, 0, chat=False)
    read = {number for number in range(1000) if any(f"rule {number}." in part for part in parts)}
    assert len(read) > 800  # some are cut in two, where a part ends
    assert max(read) > 990
    assert any(part.startswith("the end") for part in parts)


def test_silent_model_writes_no_queries(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_study, "_continue", lambda model, rows, sampling, *, chat: [" \n"] * len(rows))
    with pytest.raises(ValueError, match="wrote no question about the context; give queries"):
        self_study.write_queries(attach(backbone), "a b c", 20, 0, chat=True)
