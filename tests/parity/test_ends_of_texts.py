"""A text that ends with an ordinary token, as a model's generation config may say, ends before it in any batch."""

from collections.abc import Callable

import pytest
import torch

from softprompt.backbones import Backbone
from softprompt.evaluation.predict import answer
from softprompt.models import attach
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example


def test_text_ends_before_an_ordinary_end_token(
    tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted, rows = attach(tiny_backbone("llama")), [(0, 70, 71, 72), (0, 80)]
    tokens = torch.stack(list(prompted.generate(torch.tensor(rows[:1]), max_new_tokens=12, stop=[])), 1)[0].tolist()
    end = next(token for at, token in enumerate(tokens) if at > 1 and token > 3 and token not in tokens[:at])
    monkeypatch.setattr(prompted.backbone.model.generation_config, "eos_token_id", [1, end])
    task = Task(name="texts", template="{text}", target="answer", metrics=("exact_match",))
    examples = [Example(row, (), None, number) for number, row in enumerate(rows)]
    [alone], [first, _] = (answer(prompted, task, part, max_new_tokens=12) for part in (examples[:1], examples))
    expected = prompted.backbone.tokenizer.decode(tokens[: tokens.index(end)], skip_special_tokens=True).strip()
    assert alone.text == first.text == expected
