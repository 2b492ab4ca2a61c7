"""A prompt for every layer, as one: what deep visual prompt tuning trains, with any method."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.prompts.base import Folded, Host, PromptConfig, SoftPrompt
from softprompt.prompts.several import Several


@final
class Deep(Several):
    """`[P_1; P_2; ...]`, `P_i` of layer i: each takes the place of what the layer before made of the one before.

    Reference: Jia et al. 2022, "Visual Prompt Tuning", VPT-deep.
    Differs: nothing.

    Raises:
        ValueError: no layers, prompts of unequal length, or a prompt that changes the input's own embeddings, which
            only the first layer has.

    >>> Deep([Folded(torch.zeros(2, 4)), Folded(torch.ones(2, 4))]).depth
    2
    """

    def __init__(self, layers: Sequence[SoftPrompt]) -> None:
        super().__init__()
        folded = [layer.fold() for layer in layers]
        lengths = [len(layer.prompt()) for layer in folded]
        if not layers or len(set(lengths)) > 1:
            raise ValueError(f"the layers' prompts are {lengths} long; give at least one, all of one length")
        if not all(layer.plain for layer in folded):
            raise ValueError(
                "a method that changes the input's own embeddings has no deep form, since deeper layers have no such "
                "embeddings; choose one that folds to a prompt alone"
            )
        self.layers = nn.ModuleList(layers)
        self.depth = len(layers)

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings as they are."""
        return embeds

    def fold(self) -> Folded:
        """One folded prompt of the same depth."""
        return Folded(self.prompt().detach().clone(), depth=self.depth)

    @property
    def _members(self) -> nn.ModuleList:
        return self.layers


def build(config: PromptConfig, hosts: Sequence[Host], generator: torch.Generator) -> SoftPrompt:
    """A fresh prompt for each host, as one: of one host the method's own, of several a deep one.

    Raises:
        ValueError: as the method's `build` and `Deep` do.
    """
    if len(hosts) == 1:
        return config.build(hosts[0], generator)
    return Deep([config.build(host, generator) for host in hosts])
