"""A prompt behind a text's first token, or behind the text, is what it is there: the same as a row written by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch
from cases import assert_near, copy_of, gradients, padded, prompts_of, rows_of
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models import PromptedModel, attach
from softprompt.prompts import Folded, SoftPrompt
from softprompt.prompts.plain import Plain
from softprompt.types import PromptPosition

TEXTS, INDEX = (7, 2, 4, 9, 3), (2, 0, 1, 0, 2)
CANDIDATES = ((11,), (12, 13), (12, 14, 15))
MakeBackbone = Callable[[str], Backbone]


def by_hand(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int) -> Tensor:
    """One row's embeddings with the prompt behind its first `lead` tokens."""
    own = prompt.shift(backbone.model.get_input_embeddings()(row)[None], row[None], torch.arange(len(row))[None])[0]
    return torch.cat([own[:lead], prompt.prompt(), own[lead:]])[None]


def lead_of(position: PromptPosition, row: Tensor) -> int:
    return 1 if position == "after_bos" else len(row)


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def decoder(request: pytest.FixtureRequest, tiny_backbone: MakeBackbone) -> Backbone:
    return tiny_backbone(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_decoder_logits_match_row_by_hand(decoder: Backbone, position: PromptPosition, side: str) -> None:
    prompts, rows = prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, side, 3)
    actual = attach(decoder, prompt_position=position)(ids, mask, prompts=prompts, index=torch.tensor(INDEX)).logits[
        mask.bool()
    ]
    expected = []
    for number, row in zip(INDEX, rows, strict=True):
        lead = lead_of(position, row)
        logits = decoder.model(inputs_embeds=by_hand(decoder, prompts[number], row, lead)).logits[0]
        expected += [logits[:lead], logits[lead + len(prompts[number].prompt()) :]]
    assert_near(actual, torch.cat(expected))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_decoder_loss_and_gradient_match_row_by_hand(decoder: Backbone, position: PromptPosition, side: str) -> None:
    """The last two tokens of each row are the answer; a prompt behind the text stands before them."""
    prompts, rows = prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, side, 3)
    labels = torch.full_like(ids, -100)
    losses = []
    for at, (number, row) in enumerate(zip(INDEX, rows, strict=True)):
        positions = mask[at].nonzero()[-2 if len(row) > 2 else -1 :, 0]
        labels[at, positions] = ids[at, positions]
        lead = lead_of(position, row[: len(row) - len(positions)])
        logits = decoder.model(inputs_embeds=by_hand(decoder, prompts[number], row, lead)).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[-len(positions) - 1 : -1], row[-len(positions) :], reduction="none"
            )
        )
    loss = attach(decoder, prompt_position=position)(ids, mask, labels, prompts=prompts, index=torch.tensor(INDEX)).loss
    expected = torch.cat(losses).mean()
    assert_near(loss, expected)
    for ours, theirs in zip(gradients(loss, prompts), gradients(expected, prompts), strict=True):
        assert float(theirs.abs().max()) > 0
        assert_near(ours, theirs)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_decoder_scores_and_tokens_match_row_by_hand(
    decoder: Backbone, position: PromptPosition, prepared: bool
) -> None:
    prompted, prompts, rows = attach(decoder, prompt_position=position), prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, "right", 2)
    inputs = prompted.prepare(prompts) if prepared else prompts
    index = torch.tensor(INDEX)
    scores = prompted.score(ids, mask, CANDIDATES, prompts=inputs, index=index)
    tokens = torch.stack(list(prompted.generate(ids, mask, max_new_tokens=4, stop=[], prompts=inputs, index=index)), 1)
    with torch.no_grad():
        for at, (number, row) in enumerate(zip(INDEX, rows, strict=True)):
            lead = lead_of(position, row)
            expected = [score_by_hand(decoder, prompts[number], row, lead, candidate) for candidate in CANDIDATES]
            assert_near(scores[at], torch.stack(expected))
            assert tokens[at].tolist() == greedy_by_hand(decoder, prompts[number], row, lead, 4)


def score_by_hand(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int, candidate: Sequence[int]) -> Tensor:
    full = torch.cat([row, torch.tensor(candidate)])
    logp = backbone.model(inputs_embeds=by_hand(backbone, prompt, full, lead)).logits[0].log_softmax(-1)
    return logp[-len(candidate) - 1 : -1].gather(1, torch.tensor(candidate)[:, None]).sum()


def greedy_by_hand(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int, count: int) -> list[int]:
    for _ in range(count):
        logits = backbone.model(inputs_embeds=by_hand(backbone, prompt, row, lead)).logits
        row = torch.cat([row, logits[0, -1:].argmax(-1)])
    return row[-count:].tolist()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_encoder_decoder_loss_matches_row_by_hand(
    tiny_backbone: MakeBackbone, name: str, position: PromptPosition, closed: bool
) -> None:
    """Behind the text, and in front of its end of sequence where it has one.

    In float64: T5 does not scale its attention, so that float32 may lose any number of digits in one row.
    """
    backbone = copy_of(tiny_backbone(name), torch.float64)
    prompted, prompts, rows = attach(backbone, prompt_position=position), prompts_of(backbone), rows_of(TEXTS)
    [end] = prompted.end_of_sequence()
    if closed:
        rows = [torch.cat([row, torch.tensor([end])]) for row in rows]
    ids, mask = padded(rows, "right", 2)
    labels = torch.tensor([[11, 12, end]] * len(rows))
    loss = prompted(ids, mask, labels, prompts=prompts, index=torch.tensor(INDEX)).loss
    losses = []
    for number, row in zip(INDEX, rows, strict=True):
        lead = lead_of(position, row[: len(row) - closed])
        embeds = by_hand(backbone, prompts[number], row, lead)
        losses.append(backbone.model(inputs_embeds=embeds, labels=labels[:1]).loss)
    expected = torch.stack(losses).mean().float()
    assert_near(loss, expected)
    for ours, theirs in zip(gradients(loss, prompts), gradients(expected, prompts), strict=True):
        assert_near(ours, theirs, 1e-4)  # the loss and what comes before the model are float32 even so


@pytest.mark.parametrize("closed", [False, True])
def test_encoder_scores_match_row_by_hand(tiny_backbone: MakeBackbone, closed: bool) -> None:
    """`text prompt [MASK] [SEP]`."""
    backbone = tiny_backbone("bert_mlm")
    tokenizer, prompts, rows = backbone.tokenizer, prompts_of(backbone), rows_of(TEXTS)
    back = [tokenizer.sep_token_id] if closed else []
    ids, mask = padded([torch.cat([row, torch.tensor(back, dtype=torch.long)]) for row in rows], "right", 2)
    scores = attach(backbone, prompt_position="suffix").score(
        ids, mask, [(11,), (12,)], prompts=prompts, index=torch.tensor(INDEX)
    )
    for at, (number, row) in enumerate(zip(INDEX, rows, strict=True)):
        full = torch.cat([row, torch.tensor([tokenizer.mask_token_id, *back])])
        logits = backbone.model(inputs_embeds=by_hand(backbone, prompts[number], full, len(row))).logits[0]
        assert_near(scores[at], logits[-1 - closed].log_softmax(-1)[[11, 12]])


def test_unsupported_prompt_position_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(
        ValueError, match=r"'after_bos', which bert \(encoder\) does not support; use 'prefix' or 'suffix'"
    ):
        attach(tiny_backbone("bert"), prompt_position="after_bos")


def test_prompts_prepared_for_other_position_are_refused(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompt, ids = Folded(torch.randn(3, backbone.dim)), torch.tensor([[5, 6]])

    def prepared(position: PromptPosition) -> tuple[PromptedModel, object]:
        prompted = attach(backbone, prompt_position=position)
        return prompted, prompted.prepare([prompt])

    (front, of_front), (back, of_behind) = prepared("prefix"), prepared("suffix")
    for prompted, other in ((front, of_behind), (back, of_front)):
        with pytest.raises(ValueError, match="prepared for another architecture, prompt position"):
            prompted(ids, prompts=other)


def test_folding_keeps_prompt_position(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompt = Plain(length=3).build(backbone.host(), torch.Generator().manual_seed(0))
    assert attach(backbone, prompt, prompt_position="suffix").folded().prompt_position == "suffix"


@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_bare_decoder_is_the_model_at_any_position(position: PromptPosition, tiny_backbone: MakeBackbone) -> None:
    backbone, ids = tiny_backbone("llama"), torch.stack(rows_of((5, 5)))
    actual = attach(backbone, prompt_position=position)(ids, labels=ids)
    full = backbone.model(input_ids=ids).logits
    assert_near(actual.loss, torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
