"""Every method learns: a tiny frozen T5 copies a row, or reverses it after a mode token, and each prompt must make it
reverse rows without that token.
"""

from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models import PromptedModel, attach
from softprompt.prompts import METHODS

PAD, END, REVERSE = 2, 1, 20
LETTERS = (10, 20)
SETTINGS = {"length": 5, "rank": 4, "width": 16, "positions": 8}
"""Settings for the methods that have them."""
STEPS = 120


def rows(generator: torch.Generator, count: int) -> Tensor:
    return torch.randint(*LETTERS, (count, 3), generator=generator)


def with_end(ids: Tensor) -> Tensor:
    return torch.cat([ids, torch.full((len(ids), 1), END)], 1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=PAD,
        eos_token_id=END,
        pad_token_id=PAD,
        dropout_rate=0.0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    optimizer, generator, steps = torch.optim.AdamW(model.parameters()), torch.Generator().manual_seed(1), 450
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        text = rows(generator, 64)
        marked = torch.cat([torch.full((64, 1), REVERSE), text], 1)
        copied = model(input_ids=with_end(text), labels=with_end(text)).loss
        (copied + model(input_ids=with_end(marked), labels=with_end(text.flip(1))).loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tokenizer = type("Tokenizer", (), {"all_special_ids": [END, PAD]})()
    return Backbone(model, tokenizer, "learner", "learner", "encoder_decoder")


def correct(prompted: PromptedModel, text: Tensor, answer: Tensor) -> float:
    """The fraction of rows that greedy decoding answers exactly."""
    generated = torch.stack(list(prompted.generate(with_end(text), max_new_tokens=4)), 1)
    return float((generated == with_end(answer)).all(1).float().mean()) if generated.shape[1] == 4 else 0.0


def test_backbone_copies_and_reverses(backbone: Backbone) -> None:
    text = rows(torch.Generator().manual_seed(9), 200)
    marked = torch.cat([torch.full((200, 1), REVERSE), text], 1)
    assert correct(attach(backbone), text, text) > 0.95
    assert correct(attach(backbone), marked, text.flip(1)) > 0.95


@pytest.mark.parametrize("method", sorted(METHODS))
def test_method_makes_the_frozen_model_reverse(method: str, backbone: Backbone) -> None:
    config = METHODS[method]()
    config = config.replace(**{name: value for name, value in SETTINGS.items() if hasattr(config, name)})
    prompted = attach(backbone, config.build(backbone.host(), torch.Generator().manual_seed(0)))
    lr_factors, before = config.rates(), backbone.checksum()
    optimizer = torch.optim.AdamW(
        [{"params": group, "rate": lr_factors[key]} for key, group in prompted.groups().items()]
    )
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group["rate"] * (1 - step / STEPS)
        text = rows(generator, 32)
        prompted(with_end(text), labels=with_end(text.flip(1))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    test_rows = rows(torch.Generator().manual_seed(8), 200)
    learned = correct(prompted.eval(), test_rows, test_rows.flip(1))
    zero_shot = correct(attach(backbone), test_rows, test_rows.flip(1))
    print(f"{method}: {learned:.2f} with the prompt, {zero_shot:.2f} without")
    assert zero_shot < 0.2
    assert learned > 0.8
    assert backbone.checksum() == before
