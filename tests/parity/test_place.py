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


def lead_of(place: PromptPosition, row: Tensor) -> int:
    return 1 if place == "after_bos" else len(row)


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def decoder(request: pytest.FixtureRequest, tiny_backbone: MakeBackbone) -> Backbone:
    return tiny_backbone(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", ["after_bos", "suffix"])
def test_a_decoders_logits(decoder: Backbone, place: PromptPosition, side: str) -> None:
    prompts, rows = prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, side, 3)
    found = attach(decoder, prompt_position=place)(ids, mask, prompts=prompts, index=torch.tensor(INDEX)).logits[
        mask.bool()
    ]
    wanted = []
    for which, row in zip(INDEX, rows, strict=True):
        lead = lead_of(place, row)
        logits = decoder.model(inputs_embeds=by_hand(decoder, prompts[which], row, lead)).logits[0]
        wanted += [logits[:lead], logits[lead + len(prompts[which].prompt()) :]]
    assert_near(found, torch.cat(wanted))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", ["after_bos", "suffix"])
def test_a_decoders_loss_and_its_gradient(decoder: Backbone, place: PromptPosition, side: str) -> None:
    """The last two tokens of each row are the answer; a prompt behind the text stands before them."""
    prompts, rows = prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, side, 3)
    labels = torch.full_like(ids, -100)
    losses = []
    for at, (which, row) in enumerate(zip(INDEX, rows, strict=True)):
        places = mask[at].nonzero()[-2 if len(row) > 2 else -1 :, 0]
        labels[at, places] = ids[at, places]
        lead = lead_of(place, row[: len(row) - len(places)])
        logits = decoder.model(inputs_embeds=by_hand(decoder, prompts[which], row, lead)).logits[0]
        losses.append(
            torch.nn.functional.cross_entropy(logits[-len(places) - 1 : -1], row[-len(places) :], reduction="none")
        )
    loss = attach(decoder, prompt_position=place)(ids, mask, labels, prompts=prompts, index=torch.tensor(INDEX)).loss
    wanted = torch.cat(losses).mean()
    assert_near(loss, wanted)
    for ours, theirs in zip(gradients(loss, prompts), gradients(wanted, prompts), strict=True):
        assert float(theirs.abs().max()) > 0
        assert_near(ours, theirs)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("place", ["after_bos", "suffix"])
def test_a_decoders_scores_and_tokens(decoder: Backbone, place: PromptPosition, prepared: bool) -> None:
    prompted, prompts, rows = attach(decoder, prompt_position=place), prompts_of(decoder), rows_of(TEXTS)
    ids, mask = padded(rows, "right", 2)
    given = prompted.prepare(prompts) if prepared else prompts
    index = torch.tensor(INDEX)
    scores = prompted.score(ids, mask, CANDIDATES, prompts=given, index=index)
    tokens = torch.stack(list(prompted.generate(ids, mask, max_new_tokens=4, stop=[], prompts=given, index=index)), 1)
    with torch.no_grad():
        for at, (which, row) in enumerate(zip(INDEX, rows, strict=True)):
            lead = lead_of(place, row)
            wanted = [score_by_hand(decoder, prompts[which], row, lead, candidate) for candidate in CANDIDATES]
            assert_near(scores[at], torch.stack(wanted))
            assert tokens[at].tolist() == greedy_by_hand(decoder, prompts[which], row, lead, 4)


def score_by_hand(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int, candidate: Sequence[int]) -> Tensor:
    whole = torch.cat([row, torch.tensor(candidate)])
    logp = backbone.model(inputs_embeds=by_hand(backbone, prompt, whole, lead)).logits[0].log_softmax(-1)
    return logp[-len(candidate) - 1 : -1].gather(1, torch.tensor(candidate)[:, None]).sum()


def greedy_by_hand(backbone: Backbone, prompt: SoftPrompt, row: Tensor, lead: int, count: int) -> list[int]:
    for _ in range(count):
        logits = backbone.model(inputs_embeds=by_hand(backbone, prompt, row, lead)).logits
        row = torch.cat([row, logits[0, -1:].argmax(-1)])
    return row[-count:].tolist()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("place", ["after_bos", "suffix"])
def test_an_encoder_decoders_loss(tiny_backbone: MakeBackbone, name: str, place: PromptPosition, closed: bool) -> None:
    """Behind the text, and in front of its end of sequence where it has one.

    In float64: T5 does not scale its attention, so that float32 may lose any number of digits in one row.
    """
    backbone = copy_of(tiny_backbone(name), torch.float64)
    prompted, prompts, rows = attach(backbone, prompt_position=place), prompts_of(backbone), rows_of(TEXTS)
    [end] = prompted.end_of_sequence()
    if closed:
        rows = [torch.cat([row, torch.tensor([end])]) for row in rows]
    ids, mask = padded(rows, "right", 2)
    labels = torch.tensor([[11, 12, end]] * len(rows))
    loss = prompted(ids, mask, labels, prompts=prompts, index=torch.tensor(INDEX)).loss
    losses = []
    for which, row in zip(INDEX, rows, strict=True):
        lead = lead_of(place, row[: len(row) - closed])
        embeds = by_hand(backbone, prompts[which], row, lead)
        losses.append(backbone.model(inputs_embeds=embeds, labels=labels[:1]).loss)
    wanted = torch.stack(losses).mean().float()
    assert_near(loss, wanted)
    for ours, theirs in zip(gradients(loss, prompts), gradients(wanted, prompts), strict=True):
        assert_near(ours, theirs, 1e-4)  # the loss and what comes before the model are float32 even so


@pytest.mark.parametrize("closed", [False, True])
def test_an_encoders_scores(tiny_backbone: MakeBackbone, closed: bool) -> None:
    """`text prompt [MASK] [SEP]`."""
    backbone = tiny_backbone("bert_mlm")
    tokenizer, prompts, rows = backbone.tokenizer, prompts_of(backbone), rows_of(TEXTS)
    behind = [tokenizer.sep_token_id] if closed else []
    ids, mask = padded([torch.cat([row, torch.tensor(behind, dtype=torch.long)]) for row in rows], "right", 2)
    scores = attach(backbone, prompt_position="suffix").score(
        ids, mask, [(11,), (12,)], prompts=prompts, index=torch.tensor(INDEX)
    )
    for at, (which, row) in enumerate(zip(INDEX, rows, strict=True)):
        whole = torch.cat([row, torch.tensor([tokenizer.mask_token_id, *behind])])
        logits = backbone.model(inputs_embeds=by_hand(backbone, prompts[which], whole, len(row))).logits[0]
        assert_near(scores[at], logits[-1 - closed].log_softmax(-1)[[11, 12]])


def test_a_place_that_cannot_be_is_refused(tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match="cannot stand 'after_bos'; it can stand 'prefix' or 'suffix'"):
        attach(tiny_backbone("bert"), prompt_position="after_bos")


def test_prompts_prepared_for_another_place_are_refused(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompt, ids = Folded(torch.randn(3, backbone.dim)), torch.tensor([[5, 6]])

    def prepared(place: PromptPosition) -> tuple[PromptedModel, object]:
        prompted = attach(backbone, prompt_position=place)
        return prompted, prompted.prepare([prompt])

    (front, of_front), (behind, of_behind) = prepared("prefix"), prepared("suffix")
    for prompted, other in ((front, of_behind), (behind, of_front)):
        with pytest.raises(ValueError, match="prepared for another architecture or place"):
            prompted(ids, prompts=other)


def test_folding_keeps_the_place(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    prompt = Plain(length=3).build(backbone.host(), torch.Generator().manual_seed(0))
    assert attach(backbone, prompt, prompt_position="suffix").folded().prompt_position == "suffix"


@pytest.mark.parametrize("place", ["after_bos", "suffix"])
def test_without_a_prompt_a_decoder_is_the_model(place: PromptPosition, tiny_backbone: MakeBackbone) -> None:
    backbone, ids = tiny_backbone("llama"), torch.stack(rows_of((5, 5)))
    found = attach(backbone, prompt_position=place)(ids, labels=ids)
    whole = backbone.model(input_ids=ids).logits
    assert_near(found.loss, torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
