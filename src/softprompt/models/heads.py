"""Classification heads for backbones without a vocabulary head, trained with the prompt."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.types import Pool


@final
class Pooling(nn.Module):
    """One vector per image, from the states of [CLS] and the patches."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        if pool not in ("cls", "patches"):
            raise ValueError(f"pool is {pool!r}; it must be 'cls' or 'patches'")
        self.pool = pool

    def forward(self, states: Float[Tensor, "batch token hidden"]) -> Float[Tensor, "batch hidden"]:
        """The first state, or the mean of the others."""
        return states[:, 0] if self.pool == "cls" else states[:, 1:].mean(1)


def linear_head(backbone: Backbone, classes: int, generator: torch.Generator) -> nn.Linear:
    """A layer `hidden_size -> classes`, float32; its weights start normal with a deviation of 0.02, as in BERT.

    Raises:
        ValueError: fewer than two classes.
    """
    if classes < 2:
        raise ValueError(
            f"{backbone.source} has no vocabulary head and answers with one of at least two classes, "
            f"but there are {classes}; choose a classification, or a backbone that generates"
        )
    # On meta first: nn.Linear would draw its initial weights from torch's global generator.
    head = nn.Linear(backbone.model.config.hidden_size, classes, device="meta").to_empty(device=backbone.device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.zero_()
    return head
