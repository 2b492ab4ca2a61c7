"""What tests of attachments share: label words, prompts, rows, batches, and how values and gradients are compared."""

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models import PromptedModel, attach, fresh_head
from softprompt.prompts import SoftPrompt
from softprompt.prompts.adept import ADePT
from softprompt.prompts.dept import DePT
from softprompt.prompts.dpt import DPT
from softprompt.prompts.plain import Plain
from softprompt.types import PromptAttention

WHOLE_WORDS = {
    "Billing": "bil",
    "Sales": "sal",
    "Returns": "ret",
    "Login": "login",
    "Delivery": "delivery",
    "Other": "ot",
}
"""Label words that the tests' tokenizer keeps whole."""


def prompts_of(backbone: Backbone) -> list[SoftPrompt]:
    """Of three lengths and three methods, moved off their first values so that each does something."""
    configs = (Plain(length=3), DePT(length=6, positions=30, rank=2), ADePT(length=1, width=4))
    made = [config.build(backbone.host(), torch.Generator().manual_seed(4)) for config in configs]
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for prompt in made:
            for parameter in prompt.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return made


def rows_of(
    counts: Sequence[int], seed: int = 1, *, first: int = 4, front: Sequence[int] = (), back: Sequence[int] = ()
) -> list[Tensor]:
    """Rows of so many tokens, drawn from id `first` on, between the ids in `front` and `back`."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.cat([torch.tensor(front), torch.randint(first, 300, (count,), generator=draw), torch.tensor(back)]).long()
        for count in counts
    ]


def padded(rows: Sequence[Tensor], side: str, extra: int, fill: int = 2) -> tuple[Tensor, Tensor]:
    """The rows as one batch, `extra` columns wider than the longest, and the mask of their tokens."""
    wide = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), wide), fill), torch.zeros(len(rows), wide, dtype=torch.long)
    for position, row in enumerate(rows):
        where = slice(wide - len(row), wide) if side == "left" else slice(0, len(row))
        ids[position, where], mask[position, where] = row, 1
    return ids, mask


def concatenated(backbone: Backbone, prompt: SoftPrompt, text: Tensor) -> Tensor:
    """Logits of `[prompt; text]` from the prompt's last vector on: what predicts each token, and what follows."""
    table = backbone.model.get_input_embeddings()
    embeds = prompt.shift(table(text)[None], text[None], torch.arange(len(text))[None])
    whole = backbone.model(inputs_embeds=torch.cat([prompt.prompt()[None], embeds], 1)).logits[0]
    return whole[len(prompt.prompt()) - 1 :]


def gradients(value: Tensor, prompts: Sequence[SoftPrompt]) -> list[Tensor]:
    """Of every parameter of every prompt; zeros where `value` does not depend on it."""
    parameters = [parameter for prompt in prompts for parameter in prompt.parameters()]
    return list(torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True))


def copy_of(backbone: Backbone, dtype: torch.dtype) -> Backbone:
    """One of its own in `dtype`: a shared model's weights would come back from it rounded."""
    return dataclasses.replace(backbone, model=copy.deepcopy(backbone.model).to(dtype))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for float32 sums in another order, relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def assert_same_gradients(ours: Tensor, theirs: Tensor, parameters: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Of two losses, for every parameter, each relative to its largest; and none of them is zero."""
    expected = torch.autograd.grad(theirs, list(parameters))
    for actual, reference in zip(torch.autograd.grad(ours, list(parameters)), expected, strict=True):
        scale = float(reference.abs().max())
        assert scale > 0
        torch.testing.assert_close(actual, reference, rtol=1e-3, atol=tolerance * scale)


def attached(backbone: Backbone, prompt_attention: PromptAttention) -> PromptedModel:
    """A DPT prompt, and a head where the backbone has no words to answer with."""
    generator = torch.Generator().manual_seed(0)
    head = fresh_head(backbone, 3, generator)
    return attach(
        backbone, DPT(length=12, rank=2).build(backbone.host(), generator), head=head, prompt_attention=prompt_attention
    )


def loss_of(prompted: PromptedModel, count: int = 6, seed: int = 1) -> Tensor:
    """Of `count` rows of 24 tokens, or small images, that answer something."""
    draw = torch.Generator().manual_seed(seed)
    if prompted.backbone.architecture == "vision":
        pixels = torch.randn(count, 3, 32, 32, generator=draw)
        return prompted.losses(pixels, None, torch.ones(count, 1, dtype=torch.long)).sum()
    ids = torch.randint(3, 200, (count, 24), generator=draw)
    if prompted.backbone.architecture == "causal":
        return prompted.losses(ids, None, torch.where(torch.arange(24) < 20, -100, ids)).sum()
    return prompted.losses(ids, None, torch.full((count, 1), 1 if prompted.head else 11)).sum()
