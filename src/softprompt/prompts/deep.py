"""A prompt for every layer, as one module: deep visual prompt tuning and prefix tuning, with any method."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.prompts.base import Folded, Host, PromptConfig, SoftPrompt


@final
class Deep(SoftPrompt):
    """`[P_1; P_2; ...]`: in a vision model `P_i` replaces the previous layer's output at the prompt, before layer i.

    In a decoder they are the keys and the values of each layer, `[K_1; V_1; K_2; ...]` (`models/deep_kv.py`).

    Reference: Jia et al. 2022, "Visual Prompt Tuning", VPT-deep.
    Differs: nothing.

    Raises:
        ValueError: no layers, prompts of unequal length, or a prompt that changes the input's own embeddings, which
            only the first layer has.

    >>> Deep([Folded(torch.zeros(2, 4)), Folded(torch.ones(2, 4))]).num_matrices
    2
    """

    start_error: float | None
    """How far the first prompt was from the warm start that it was built for, relative to its size; None without one.
    Above 0 where the method cannot represent every matrix."""

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
        self.num_matrices = len(layers)
        self.start_error = None

    @property
    def _prompts(self) -> list[SoftPrompt]:
        return [layer for layer in self.layers if isinstance(layer, SoftPrompt)]

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The layers' prompts, concatenated."""
        return torch.cat([layer.prompt() for layer in self._prompts])

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings unchanged."""
        return embeds

    def fold(self) -> Folded:
        """One folded prompt of as many matrices."""
        return Folded(self.prompt().detach().clone(), num_matrices=self.num_matrices)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The layers' groups, merged by name."""
        groups: dict[str, list[nn.Parameter]] = {}
        for layer in self._prompts:
            for name, parameters in layer.groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups


def build(config: PromptConfig, hosts: Sequence[Host], generator: torch.Generator) -> SoftPrompt:
    """A fresh prompt for one host, or a deep prompt for several, with its `start_error`.

    Raises:
        ValueError: as the method's `build` and `Deep` do.
    """
    if len(hosts) == 1:
        return config.build(hosts[0], generator)
    deep = Deep([config.build(host, generator) for host in hosts])
    starts = [host.start for host in hosts if host.start is not None]
    if len(starts) == len(hosts):
        start = torch.cat(starts).float()
        deep.start_error = float((deep.prompt().detach() - start).norm() / start.norm())
    return deep
