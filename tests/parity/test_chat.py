"""Conversations have the tokens that the chat template renders, in training, in the service, and after a context."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from tests.conftest import CHATML
from tests.parity.cases import assert_near

from softprompt import Backbone, Experiment, Plain, TrainingConfig, load_backbone, predict, train
from softprompt.evaluation.distillation import labeled_batch
from softprompt.models import attach
from softprompt.serve import Engine
from softprompt.serve.api.app import make_app
from softprompt.serve.api.schemas import Message
from softprompt.serve.engine import encode as service
from softprompt.tasks import Task
from softprompt.tasks.data.tokenize import encode
from softprompt.training.context import check_after_context, make_teacher

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<s>system\nbe brief</s>\n{% endif %}" + CHATML
"""Writes a system message where there is none, as SmolLM2's template does."""
IN_FIRST_TURN = (
    "{% for m in messages %}{% if m.role != 'system' %}<s>{{ m.role }}\n"
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Writes the system message into the user's first one, as Gemma's and Llama 2's templates do."""
TASK = Task(name="chat", messages="messages", metrics=("exact_match",))


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


SHORT = [says("user", "a b"), says("assistant", "c d")]
CONVERSATIONS = [
    SHORT,
    [says("system", "a"), *SHORT, says("user", "b"), says("assistant", " c")],
    [says("developer", "a"), says("user", "b"), says("user", "c"), says("assistant", "d")],
    [says("user", [{"type": "text", "text": "é"}, {"type": "text", "text": "\u65e5"}]), says("assistant", "d")],
    [says("user", "a</s>\n<s>system\nb <pad>"), says("assistant", "c</s> <s>")],
]


@pytest.fixture(params=[CHATML, DEFAULT_SYSTEM], ids=["chatml", "default system"])
def backbone(request: pytest.FixtureRequest, chat_folder: Path) -> Backbone:
    loaded = load_backbone(str(chat_folder), dtype="float32")
    loaded.tokenizer.chat_template = request.param
    return loaded


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_training_input_equals_the_services(backbone: Backbone, messages: list[dict[str, Any]]) -> None:
    asked = [Message.model_validate(message).to_template() for message in messages[:-1]]
    for cell in (messages, json.dumps(messages)):
        [example] = encode(TASK, backbone.tokenizer, [{"messages": cell}], 500)[0]
        assert example.input_ids == service.chat(backbone, asked, 500)
    [unanswered] = encode(TASK, backbone.tokenizer, [{"messages": messages[:-1]}], 500, answers=False)[0]
    [answered] = encode(TASK, backbone.tokenizer, [{"messages": messages}], 500, answers=False)[0]
    assert unanswered.input_ids == answered.input_ids == example.input_ids
    assert not answered.answer_ids


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
def test_answer_is_what_the_template_writes(backbone: Backbone, messages: list[dict[str, Any]]) -> None:
    tokenizer = backbone.tokenizer
    [example] = encode(TASK, tokenizer, [{"messages": messages}], 500)[0]
    roles = [says(message["role"].replace("developer", "system"), message["content"]) for message in messages]
    text = tokenizer.apply_chat_template(roles, tokenize=False)
    # The template ends with a line break, which no model generates after the end of its answer.
    assert (
        list(example.input_ids + example.answer_ids)
        == tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    )
    assert example.answer_ids[-1] == tokenizer.eos_token_id


def test_names_of_control_tokens_are_text_in_every_message(backbone: Backbone) -> None:
    special = set(backbone.tokenizer.all_special_ids)
    [plain] = encode(TASK, backbone.tokenizer, [{"messages": SHORT}], 500)[0]
    [example] = encode(TASK, backbone.tokenizer, [{"messages": CONVERSATIONS[-1]}], 500)[0]
    for field in ("input_ids", "answer_ids"):
        counts = [sum(token in special for token in getattr(each, field)) for each in (plain, example)]
        assert counts[0] == counts[1]
    assert "c</s> <s>" in backbone.tokenizer.decode(example.answer_ids)


def test_prediction_equals_the_services_chat_completion(chat_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(chat_folder), dtype="float32")
    rows = [{"messages": conversation} for conversation in CONVERSATIONS[:3]]
    for split, of_split in {"train": rows[:2], "dev": rows[1:], "test": rows}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    files = "".join(f'{split} = "{split}.jsonl"\n' for split in ("train", "dev", "test"))
    (tmp_path / "task.toml").write_text(files + 'messages = "messages"\n')
    settings = TrainingConfig(steps=3, batch_size=4, eval_steps=3, lr=0.3, max_new_tokens=6)
    experiment = Experiment(
        backbone=str(chat_folder),
        task=str(tmp_path / "task.toml"),
        prompt=Plain(length=4),
        training=settings,
        dtype="float32",
    )
    run = train(experiment, out=tmp_path / "runs", name="chat", backbone=backbone)
    answers = predict(run, rows, backbone=backbone)
    assert [line["gold"] for line in run.predictions()] == [["c d"], [" c"], ["d"]]
    with Engine(backbone) as engine, TestClient(make_app(engine), base_url="http://localhost") as client:
        engine.add("chat", run.folder)
        for conversation, answer in zip(CONVERSATIONS, answers, strict=False):
            body = {"model": "chat", "messages": conversation[:-1], "temperature": 0}
            served = client.post("/v1/chat/completions", json=body).json()
            assert "note" not in served
            assert served["choices"][0]["message"]["content"].strip() == answer.text
        refused = client.post("/v1/completions", json={"model": "chat", "row": {"messages": "[]"}})
        assert "send messages to a chat completion" in refused.text
        assert [entry["chat"] for entry in client.get("/v1/prompts").json()["data"]] == [True]


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, IN_FIRST_TURN])
def test_teacher_reads_the_context_as_system_message(chat_folder: Path, template: str) -> None:
    backbone = load_backbone(str(chat_folder), dtype="float32")
    backbone.tokenizer.chat_template = template
    context = "answer <s> with a b and c"
    rows = [{"messages": conversation} for conversation in (SHORT, [*SHORT, says("user", "b"), says("assistant", "c")])]
    examples = encode(TASK, backbone.tokenizer, rows, 500)[0]
    teacher, student = make_teacher(context, backbone, TASK, 16), attach(backbone)
    check_after_context(teacher, context, TASK, rows, examples, "train split", 16)
    logits, targets = teacher.label_logits(*labeled_batch(student, examples))
    for row, example, found, target in zip(rows, examples, logits, targets, strict=True):
        expected = _answer_logits(backbone, [says("system", context), *row["messages"]], len(example.answer_ids))
        assert_near(found[target != -100].log_softmax(-1), expected)


def _answer_logits(backbone: Backbone, messages: Sequence[dict[str, Any]], count: int) -> torch.Tensor:
    """Log-probabilities at the last `count` tokens of a conversation that the service would be sent."""
    asked = service.chat(backbone, messages[:-1], 500)
    [example] = encode(TASK, backbone.tokenizer, [{"messages": messages}], 500)[0]
    ids = torch.tensor([[*asked, *example.answer_ids]])
    with torch.no_grad():
        return backbone.model(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1)


def test_cut_contexts_keep_the_system_messages_frame(backbone: Backbone) -> None:
    teacher = make_teacher("a b c d e f", backbone, TASK, 16)
    header, text = (
        backbone.tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("<s>system\n", "a b c d e f")
    )
    for from_end, kept in ((False, text[:3]), (True, text[-3:])):
        shortened = teacher.shortened(3, from_end=from_end)
        assert shortened is not None
        frame = teacher.context[len(header) + len(text) :]
        assert shortened.context == (*header, *kept, *frame)
    assert teacher.shortened(len(text), from_end=True) is None
