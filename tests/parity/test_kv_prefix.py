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
from softprompt.backbones.kernels import llama as fused_layers
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
def test_logits_and_gradients_equal_concatenation(decoder: Backbone, side: str, extra: int) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask = padded(rows, side, extra)
    output = attach(decoder)(ids, mask, prompts=prompts, index=INDEX).logits[mask.bool()]
    expected = torch.cat(
        [concatenated(decoder, prompts[prompt], row)[1:] for prompt, row in zip(INDEX, rows, strict=True)]
    )
    assert_near(output, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        gradients((output * weights).sum(), prompts), gradients((expected * weights).sum(), prompts), strict=True
    ):
        assert float(theirs.abs().max()) > 0
        assert_near(ours, theirs, 1e-4)  # a gradient sums over every row and token


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_without_prompt_equal_the_models(decoder: Backbone, side: str) -> None:
    rows = texts()
    ids, mask = padded(rows, side, 13)
    output = attach(decoder)(ids, mask).logits[mask.bool()]
    assert_near(output, torch.cat([decoder.model(input_ids=row[None]).logits[0] for row in rows]))


@pytest.mark.parametrize("method", METHODS)
def test_shift_positions_start_at_the_text(method: str, tiny_backbone: MakeBackbone) -> None:
    backbone, rows = tiny_backbone("llama"), texts()
    prompt = METHODS[method](length=40).build(backbone.host(), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    prompted = attach(backbone, prompt)
    ids, mask = padded(rows, "right", 5)
    output = prompted(ids, mask).logits[mask.bool()]
    assert_near(output, torch.cat([concatenated(backbone, prompt, row)[1:] for row in rows]))
    # Candidates and generated tokens come after the text, and count on from there.
    answer = torch.tensor([9, 11, 12])
    scores = prompted.score(ids, mask, [answer.tolist()])[:, 0]
    slow = [concatenated(backbone, prompt, torch.cat([row, answer]))[-4:-1].log_softmax(-1) for row in rows]
    assert_near(scores, torch.stack([logp.gather(1, answer[:, None]).sum() for logp in slow]))
    for row, made in zip(
        rows, torch.stack(list(prompted.generate(ids, mask, max_new_tokens=5, stop=[])), 1), strict=True
    ):
        text = torch.cat([row, made])
        assert torch.equal(concatenated(backbone, prompt, text)[len(row) : -1].argmax(-1), made)


def label_logits(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with 3 pads, and labels at each row's end, its first token, and on padding (ignored there)."""
    ids, mask = padded(rows, side, 3)
    labels = torch.where(mask == 1, ids, 5)
    for position, row in enumerate(rows):
        columns = mask[position].nonzero()[:, 0]
        labels[position, columns[1 : len(row) - 2]] = -100
    labels[1, :] = -100
    labels[1, mask[1].nonzero()[0]] = 77
    return ids, mask, labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_with_labels_on_the_first_token(decoder: Backbone, side: str) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask, labels = label_logits(rows, side)
    output = attach(decoder)(ids, mask, labels, prompts=prompts, index=INDEX)
    losses = []
    for position, row in enumerate(rows):
        logits = concatenated(decoder, prompts[int(INDEX[position])], row)[:-1]
        expected = labels[position][mask[position].bool()]
        losses.append(torch.nn.functional.cross_entropy(logits, expected, ignore_index=-100, reduction="none"))
    counted = int(((labels != -100) & (mask == 1)).sum())
    loss = torch.cat(losses).sum() / counted
    assert_near(output.loss, loss)
    assert output.logits.shape[1] < ids.shape[1], "the head ran at positions without a label"
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
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    output = attach(backbone, Folded(ours))(ids, None, labels).loss
    assert_near(output, expected)
    assert_near(torch.autograd.grad(output, ours)[0], torch.autograd.grad(expected, matrix)[0], 1e-4)


@pytest.mark.parametrize("candidates", [[[5], [7], [299]], [[5], [9, 11], [12, 13, 14, 15], [9, 12]]])
def test_score_sums_log_probabilities(decoder: Backbone, candidates: list[list[int]]) -> None:
    prompts, rows = prompts_of(decoder), texts()
    ids, mask = padded(rows, "right", 2)
    output = attach(decoder).score(ids, mask, candidates, prompts=prompts, index=INDEX)
    expected_scores = []
    for prompt, row in zip(INDEX, rows, strict=True):
        for candidate in candidates:
            logits = concatenated(decoder, prompts[prompt], torch.cat([row, torch.tensor(candidate)]))[len(row) : -1]
            expected_scores.append(logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None]).sum())
    expected = torch.stack(expected_scores).view_as(output)
    assert_near(output, expected)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    for ours, theirs in zip(
        gradients((output * weights).sum(), prompts), gradients((expected * weights).sum(), prompts), strict=True
    ):
        assert_near(ours, theirs, 1e-4)


def test_prepared_prompts_equal_prompts(decoder: Backbone) -> None:
    prompts, prompted = prompts_of(decoder), attach(decoder)
    ids, mask = padded(texts(), "left", 4)
    prepared = prompted.prepare(prompts)
    first: Any = prompted(ids, mask, prompts=prepared, index=INDEX).logits
    again = prompted(ids, mask, prompts=prepared, index=INDEX).logits
    fresh = prompted(ids, mask, prompts=prompts, index=INDEX).logits
    assert torch.equal(first, again), "a call changed what was prepared"
    assert_near(first, fresh)


def test_score_does_not_depend_on_the_batch(decoder: Backbone) -> None:
    prompts, rows = prompts_of(decoder), texts()
    prompted: PromptedModel = attach(decoder)
    batched = prompted.score(*padded(rows, "left", 0), [[5], [9, 11]], prompts=prompts, index=INDEX)
    single = [
        prompted.score(row[None], None, [[5], [9, 11]], prompts=[prompts[prompt]])
        for prompt, row in zip(INDEX, rows, strict=True)
    ]
    assert_near(batched, torch.cat(single))


def test_packs_unless_the_model_has_its_own_attention(decoder: Backbone) -> None:
    """BLOOM and Gemma 2 have their own attention, so their prompts run before their rows."""
    packs = decoder.model.config.model_type not in ("bloom", "gemma2")
    assert attach(decoder).layout == ("packed" if packs else "cached")


@pytest.mark.parametrize("prepared", [False, True])
def test_score_equals_concatenation_packed_and_prepared(decoder: Backbone, prepared: bool) -> None:
    prompted = attach(decoder)
    prompts = prompts_of(decoder)
    ids, mask = padded(texts(), "right", 2)
    output = prompted.score(
        ids, mask, [[5], [9]], prompts=prompted.prepare(prompts) if prepared else prompts, index=INDEX
    )
    expected = [
        concatenated(decoder, prompts[prompt], row)[-1].log_softmax(-1)[[5, 9]]
        for prompt, row in zip(INDEX, texts(), strict=True)
    ]
    assert_near(output, torch.stack(expected))


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6), (4,)])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prepared_prompts_run_through_fused_layers(
    name: str, lengths: Sequence[int], tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of every token, including a row's first, which the prompt alone predicts."""
    backbone, passes = tiny_backbone(name), 0
    run = fused_layers.run

    def counted(*args: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return run(*args)

    monkeypatch.setattr(fused_layers, "run", counted)
    prompts = prompts_of(backbone, lengths)
    index = INDEX if len(lengths) > 1 else torch.zeros_like(INDEX)
    prompted, rows = attach(backbone), texts()
    ids, mask = padded(rows, "right", 2)
    passes = 0  # attach runs it once to compare
    with torch.no_grad():
        prepared = prompted.prepare(prompts)
        output, targets = prompted.label_logits(ids, mask, ids.masked_fill(mask == 0, -100), prepared, index)
        scores = prompted.score(ids, mask, [[5], [9]], prepared, index)
        assert passes == 2
        expected = [concatenated(backbone, prompts[prompt], row) for prompt, row in zip(index, rows, strict=True)]
    assert_near(output[targets != -100], torch.cat([logits[:-1] for logits in expected]))
    assert_near(scores, torch.stack([logits[-1].log_softmax(-1)[[5, 9]] for logits in expected]))
