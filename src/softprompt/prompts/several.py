"""What a prompt made of several prompts has in common, whether they stand behind one another or in layers."""

from abc import abstractmethod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import SoftPrompt


class Several(SoftPrompt):
    """`[P_1; P_2; ...]` of prompts that are modules of this one; what it does to the input is not said here."""

    @property
    @abstractmethod
    def _members(self) -> nn.ModuleList:
        """The prompts, under the name that their tensors have on disk."""

    @property
    @final
    def _prompts(self) -> list[SoftPrompt]:
        return [one for one in self._members if isinstance(one, SoftPrompt)]

    @final
    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The prompts in their order."""
        return torch.cat([one.prompt() for one in self._prompts])

    @final
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompts' groups of one name together."""
        groups: dict[str, list[nn.Parameter]] = {}
        for one in self._prompts:
            for name, parameters in one.groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups
