"""A shared prefix is concatenation: the same logits, losses, scores, tokens and gradients, whatever the padding.

The reference is a row at a time: the prompt's vectors in front of the text's, without mask, padding or cache.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from cases import assert_near, concatenated, gradients, padded, rows_of
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import llama as own_layers
from softprompt.models import PromptedModel, attach
from softprompt.prompts import METHODS, Folded, SoftPrompt
from softprompt.prompts.plain import Plain

LENGTHS = (3, 6, 1)
"""Of the three prompts in one batch."""
INDEX = torch.tensor([2, 0, 1, 0, 2])
TEXTS = (7, 1, 4, 9, 3)
"""Tokens of each row."""
MakeBackbone = Callable[[str], Backbone]


def prompts_of(backbone: Backbone, lengths: Sequence[int] = LENGTHS) -> list[SoftPrompt]:
    host = backbone.host()
    return [
        Plain(length=length).build(host, torch.Generator().manual_seed(seed)) for seed, length in enumerate(lengths)
    ]


def texts() -> list[Tensor]:
    return rows_of(TEXTS, first=3)


@pytest.mark.parametrize("extra", [0, 1, 40])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients(decoder: Backbone, side: str, extra: int) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask = padded(rows, side, extra)
    found = attach(decoder)(ids, mask, prompts=prompts, index=INDEX).logits[mask.bool()]
    wanted = torch.cat([concatenated(decoder, prompts[which], row)[1:] for which, row in zip(INDEX, rows, strict=True)])
    assert_near(found, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        gradients((found * weights).sum(), prompts), gradients((wanted * weights).sum(), prompts), strict=True
    ):
        assert float(theirs.abs().max()) > 0
        assert_near(ours, theirs, 1e-4)  # a gradient sums over every row and token


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_prompt_it_is_the_model_itself(decoder: Backbone, side: str) -> None:
    rows = texts()
    ids, mask = padded(rows, side, 13)
    found = attach(decoder)(ids, mask).logits[mask.bool()]
    assert_near(found, torch.cat([decoder.model(input_ids=row[None]).logits[0] for row in rows]))


@pytest.mark.parametrize("method", METHODS)
def test_the_inputs_shift_counts_positions_from_the_texts_first_token(method: str, tiny_backbone: MakeBackbone) -> None:
    backbone, rows = tiny_backbone("llama"), texts()
    prompt = METHODS[method](length=40).build(backbone.host(), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    prompted = attach(backbone, prompt)
    ids, mask = padded(rows, "right", 5)
    found = prompted(ids, mask).logits[mask.bool()]
    assert_near(found, torch.cat([concatenated(backbone, prompt, row)[1:] for row in rows]))
    # Candidates and generated tokens come after the text, and count on from there.
    answer = torch.tensor([9, 11, 12])
    scores = prompted.score(ids, mask, [answer.tolist()])[:, 0]
    slow = [concatenated(backbone, prompt, torch.cat([row, answer]))[-4:-1].log_softmax(-1) for row in rows]
    assert_near(scores, torch.stack([logp.gather(1, answer[:, None]).sum() for logp in slow]))
    for row, made in zip(
        rows, torch.stack(list(prompted.generate(ids, mask, max_new_tokens=5, stop=[])), 1), strict=True
    ):
        whole = torch.cat([row, made])
        assert torch.equal(concatenated(backbone, prompt, whole)[len(row) : -1].argmax(-1), made)


def label_logits(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with 3 pads and labels at the end of each row, at its first token, and on padding (to be ignored)."""
    ids, mask = padded(rows, side, 3)
    labels = torch.where(mask == 1, ids, 5)
    for place, row in enumerate(rows):
        at = mask[place].nonzero()[:, 0]
        labels[place, at[1 : len(row) - 2]] = -100
    labels[1, :] = -100
    labels[1, mask[1].nonzero()[0]] = 77
    return ids, mask, labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_with_labels_on_the_first_token(decoder: Backbone, side: str) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask, labels = label_logits(rows, side)
    output = attach(decoder)(ids, mask, labels, prompts=prompts, index=INDEX)
    losses = []
    for place, row in enumerate(rows):
        logits = concatenated(decoder, prompts[int(INDEX[place])], row)[:-1]
        wanted = labels[place][mask[place].bool()]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="none"))
    counted = int(((labels != -100) & (mask == 1)).sum())
    loss = torch.cat(losses).sum() / counted
    assert_near(output.loss, loss)
    assert output.logits.shape[1] < ids.shape[1], "the head ran at places without a label"
    for ours, theirs in zip(gradients(output.loss, prompts), gradients(loss, prompts), strict=True):
        assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma", "bloom"])
def test_loss_equals_stock_pefts(name: str, tiny_backbone: MakeBackbone) -> None:
    """On rows without padding, which stock PEFT puts between prompt and text; OPT's projection crashes in it."""
    backbone = tiny_backbone(name)
    ours = prompts_of(backbone)[1].prompt().detach().requires_grad_()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTHS[1])
    theirs = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    matrix = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        matrix.copy_(ours)
    ids = torch.randint(3, 300, (4, 8), generator=torch.Generator().manual_seed(4))
    labels = ids.masked_fill(torch.rand(4, 8, generator=torch.Generator().manual_seed(5)) < 0.5, -100)
    labels[0, 0] = ids[0, 0]
    wanted = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    found = attach(backbone, Folded(ours))(ids, None, labels).loss
    assert_near(found, wanted)
    assert_near(torch.autograd.grad(found, ours)[0], torch.autograd.grad(wanted, matrix)[0], 1e-4)


@pytest.mark.parametrize("candidates", [[[5], [7], [299]], [[5], [9, 11], [12, 13, 14, 15], [9, 12]]])
def test_scores_are_sums_of_log_probabilities(decoder: Backbone, candidates: list[list[int]]) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask = padded(rows, "right", 2)
    found = attach(decoder).score(ids, mask, candidates, prompts=prompts, index=INDEX)
    wanted = []
    for which, row in zip(INDEX, rows, strict=True):
        for candidate in candidates:
            logits = concatenated(decoder, prompts[which], torch.cat([row, torch.tensor(candidate)]))[len(row) : -1]
            wanted.append(logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None]).sum())
    whole = torch.stack(wanted).view_as(found)
    assert_near(found, whole)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    for ours, theirs in zip(
        gradients((found * weights).sum(), prompts), gradients((whole * weights).sum(), prompts), strict=True
    ):
        assert_near(ours, theirs, 1e-4)


def test_prompts_prepared_once_answer_as_prompts_do(decoder: Backbone) -> None:
    prompts, prompted = prompts_of(decoder), attach(decoder)
    ids, mask = padded(texts(), "left", 4)
    prepared = prompted.prepare(prompts)
    first: Any = prompted(ids, mask, prompts=prepared, index=INDEX).logits
    again = prompted(ids, mask, prompts=prepared, index=INDEX).logits
    fresh = prompted(ids, mask, prompts=prompts, index=INDEX).logits
    assert torch.equal(first, again), "a call changed what was prepared"
    assert_near(first, fresh)


def test_a_batch_moves_nothing_in_a_rows_answer(decoder: Backbone) -> None:
    prompts, rows = prompts_of(decoder), texts()
    prompted: PromptedModel = attach(decoder)
    together = prompted.score(*padded(rows, "left", 0), [[5], [9, 11]], prompts=prompts, index=INDEX)
    alone = [
        prompted.score(row[None], None, [[5], [9, 11]], prompts=[prompts[which]])
        for which, row in zip(INDEX, rows, strict=True)
    ]
    assert_near(together, torch.cat(alone))


def test_prompts_and_rows_run_packed_wherever_the_model_hands_it_on(decoder: Backbone) -> None:
    """BLOOM and Gemma 2 keep attention of their own, so their prompts run before their rows."""
    assert attach(decoder).packs == (decoder.model.config.model_type not in ("bloom", "gemma2"))


@pytest.mark.parametrize("prepared", [False, True])
def test_packed_and_prepared_prompts_score_alike(decoder: Backbone, prepared: bool) -> None:
    prompted = attach(decoder)
    prompts = prompts_of(decoder)
    ids, mask = padded(texts(), "right", 2)
    found = prompted.score(
        ids, mask, [[5], [9]], prompts=prompted.prepare(prompts) if prepared else prompts, index=INDEX
    )
    wanted = [
        concatenated(decoder, prompts[which], row)[-1].log_softmax(-1)[[5, 9]]
        for which, row in zip(INDEX, texts(), strict=True)
    ]
    assert_near(found, torch.stack(wanted))


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6), (4,)])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prepared_prompts_run_through_our_own_layers(
    name: str, lengths: Sequence[int], tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of every token, a row's first one among them, which the prompt alone predicts."""
    backbone, passes = tiny_backbone(name), 0
    run = own_layers.run

    def counted(*given: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return run(*given)

    monkeypatch.setattr(own_layers, "run", counted)
    prompts = prompts_of(backbone, lengths)
    index = INDEX if len(lengths) > 1 else torch.zeros_like(INDEX)
    prompted, rows = attach(backbone), texts()
    ids, mask = padded(rows, "right", 2)
    passes = 0  # attach has compared once
    with torch.no_grad():
        prepared = prompted.prepare(prompts)
        found, targets = prompted.label_logits(ids, mask, ids.masked_fill(mask == 0, -100), prepared, index)
        again = prompted.score(ids, mask, [[5], [9]], prepared, index)
        assert passes == 2
        wanted = [concatenated(backbone, prompts[which], row) for which, row in zip(index, rows, strict=True)]
    assert_near(found[targets != -100], torch.cat([one[:-1] for one in wanted]))
    assert_near(again, torch.stack([one[-1].log_softmax(-1)[[5, 9]] for one in wanted]))
