"""An isolated prompt is the model's own forward under a mask that hides the text from the prompt, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import assert_same_gradients, padded, prompts_of, rows_of
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models import attach, fresh_head
from softprompt.prompts import SoftPrompt

TEXTS, INDEX = (7, 2, 4, 9, 3), (2, 0, 1, 0, 2)
MakeBackbone = Callable[[str], Backbone]


def laid_out(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int) -> tuple[Tensor, Tensor, Tensor]:
    """One row's embeddings, what each place sees, and which places are the text's."""
    own = prompt.shift(backbone.model.get_input_embeddings()(row)[None], row[None], torch.arange(len(row))[None])[0]
    vectors = prompt.prompt()
    position = torch.arange(len(row) + len(vectors))
    of_prompt = (position >= lead) & (position < lead + len(vectors))
    visible = ~of_prompt[:, None] | of_prompt[None]
    return torch.cat([own[:lead], vectors, own[lead:]])[None], visible[None, None], ~of_prompt


def assert_same(ours: Tensor, theirs: Tensor, prompts: Sequence[SoftPrompt]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    parameters = [parameter for prompt in prompts for parameter in prompt.parameters()]
    assert_same_gradients(ours, theirs, parameters, 2e-4)


READY = pytest.mark.parametrize("ready", [False, True], ids=["live", "prepared"])
"""Prompts run with their rows, or before them and for good."""


@READY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["t5", "t5_1.1", "mt5"])
def test_t5_self_attention_prompt_matches_mask(tiny_backbone: MakeBackbone, name: str, side: str, ready: bool) -> None:
    backbone = tiny_backbone(name)
    prompted, prompts, rows = attach(backbone, prompt_attention="self"), prompts_of(backbone), rows_of(TEXTS)
    labels = torch.tensor([[11, 12, 1]] * len(rows))
    inputs = prompted.prepare(prompts) if ready else prompts
    ours = prompted(*padded(rows, side, 2), labels, prompts=inputs, index=torch.tensor(INDEX)).loss
    losses = []
    for number, row in zip(INDEX, rows, strict=True):
        embeds, visible, _ = laid_out(backbone, prompts[number], row, 0)
        states = backbone.model.get_encoder()(inputs_embeds=embeds, attention_mask=visible)
        losses.append(backbone.model(encoder_outputs=states, labels=labels[:1]).loss)
    assert_same(ours, torch.stack(losses).mean(), prompts)


@READY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm"])
def test_masked_lm_self_attention_prompt_matches_mask(
    tiny_backbone: MakeBackbone, name: str, side: str, ready: bool
) -> None:
    backbone = tiny_backbone(name)
    first, closing, mask = (getattr(backbone.tokenizer, f"{one}_token_id") for one in ("cls", "sep", "mask"))
    prompted, prompts = attach(backbone, prompt_attention="self"), prompts_of(backbone)
    rows, labels = rows_of(TEXTS, front=[first], back=[mask, closing]), torch.full((len(TEXTS), 1), 11)
    inputs = prompted.prepare(prompts) if ready else prompts
    ours = prompted(*padded(rows, side, 2), labels, prompts=inputs, index=torch.tensor(INDEX)).loss
    losses = []
    for number, row in zip(INDEX, rows, strict=True):
        embeds, visible, own = laid_out(backbone, prompts[number], row, 1)
        logits = backbone.model(inputs_embeds=embeds, attention_mask=visible).logits[0, own]
        losses.append(torch.nn.functional.cross_entropy(logits[row == mask], torch.tensor([11])))
    assert_same(ours, torch.stack(losses).mean(), prompts)


@READY
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_head_encoder_self_attention_prompt_matches_mask(tiny_backbone: MakeBackbone, name: str, ready: bool) -> None:
    backbone = tiny_backbone(name)
    head = fresh_head(backbone, 3, torch.Generator().manual_seed(2))
    prompts, rows = prompts_of(backbone), rows_of(TEXTS, front=[0], back=[1])
    prompted, labels = attach(backbone, head=head, prompt_attention="self"), torch.full((len(TEXTS), 1), 2)
    inputs = prompted.prepare(prompts) if ready else prompts
    ours = prompted(*padded(rows, "right", 2), labels, prompts=inputs, index=torch.tensor(INDEX)).loss
    losses = []
    for number, row in zip(INDEX, rows, strict=True):
        embeds, visible, own = laid_out(backbone, prompts[number], row, 1)
        states = backbone.model(inputs_embeds=embeds, attention_mask=visible).last_hidden_state[0, own]
        losses.append(torch.nn.functional.cross_entropy(head(states.mean(0))[None], torch.tensor([2])))
    assert_same(ours, torch.stack(losses).mean(), prompts)


@pytest.mark.parametrize("name", ["llama", "bart", "distilbert_mlm", "mpnet_mlm"])
def test_unsupported_model_is_refused(tiny_backbone: MakeBackbone, name: str) -> None:
    with pytest.raises(ValueError, match="prompt_attention"):
        attach(tiny_backbone(name), prompt_attention="self")


def test_self_attention_needs_prefix_position(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(
        ValueError, match=r"which t5 \(encoder_decoder\) does not support with prompt_position 'suffix'"
    ):
        attach(tiny_backbone("t5"), prompt_attention="self", prompt_position="suffix")


def test_row_does_not_depend_on_neighbors(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("t5")
    prompt, rows = prompts_of(backbone)[0], rows_of(TEXTS)
    prompted = attach(backbone, prompt, prompt_attention="self")
    batched = prompted.score(*padded(rows, "right", 2), [(11,), (12, 13)])
    single_row = torch.cat([prompted.score(row[None], None, [(11,), (12, 13)]) for row in rows])
    torch.testing.assert_close(batched, single_row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bert_mlm"])
def test_prepared_prompt_runs_once(tiny_backbone: MakeBackbone, name: str) -> None:
    backbone = tiny_backbone(name)
    prompted, rows = attach(backbone, prompt_attention="self"), rows_of(TEXTS)
    layer = next(module for module in backbone.model.modules() if type(module) is torch.nn.Linear)
    prepared, tokens = prompted.prepare(prompts_of(backbone)), []
    watching = layer.register_forward_hook(lambda module, inputs, actual: tokens.append(actual.shape[:-1].numel()))
    with watching, torch.no_grad():
        for _ in range(2):
            prompted.score(*padded(rows, "right", 2), [(11,), (12,)], prompts=prepared, index=torch.tensor(INDEX))
    of_mask = len(rows) if name == "bert_mlm" else 0  # each row gets a mask token
    assert tokens == [sum(TEXTS) + of_mask] * 2


def test_prompts_prepared_for_full_attention_are_refused(tiny_backbone: MakeBackbone) -> None:
    backbone, ids = tiny_backbone("t5"), torch.tensor([[3, 4]])
    joint, isolated = attach(backbone), attach(backbone, prompt_attention="self")
    for one, other in ((joint, isolated), (isolated, joint)):
        with pytest.raises(ValueError, match=r"was prepared for .*; prepare the prompts again"):
            one.score(ids, None, [(11,)], prompts=other.prepare(prompts_of(backbone)[:1]))


SKIPPED_PARTS: dict[str, Callable[[Any], Any]] = {
    "encoder": lambda encoder: encoder,
    "block": lambda encoder: encoder.block[1],
    "layer": lambda encoder: encoder.block[0].layer[0],
    "attention": lambda encoder: encoder.block[0].layer[0].SelfAttention,
}


@pytest.mark.parametrize("part", SKIPPED_PARTS)
def test_hook_that_would_be_skipped_is_refused(tiny_backbone: MakeBackbone, part: str) -> None:
    backbone, ids = tiny_backbone("t5"), torch.tensor([[3, 4]])
    prompted = attach(backbone, prompts_of(backbone)[0], prompt_attention="self")
    hooked = SKIPPED_PARTS[part](backbone.model.get_encoder())
    with (
        hooked.register_forward_hook(lambda *_: None),
        pytest.raises(ValueError, match=f"a {type(hooked).__name__} of the encoder has a hook"),
    ):
        prompted.score(ids, None, [(11,)])
    prompted.score(ids, None, [(11,)])


def test_hook_on_a_part_that_runs_takes_part(tiny_backbone: MakeBackbone) -> None:
    backbone, ids = tiny_backbone("t5"), torch.tensor([[3, 4]])
    prompted = attach(backbone, prompts_of(backbone)[0], prompt_attention="self")
    feed_forward = backbone.model.get_encoder().block[0].layer[1]
    with feed_forward.register_forward_hook(lambda _, __, output: -output):
        changed = prompted.score(ids, None, [(11,)])
    assert not torch.allclose(changed, prompted.score(ids, None, [(11,)]))
