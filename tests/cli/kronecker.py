"""A method of one's own, in a file outside the package: `--prompt-module kronecker.py`."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt import Host, PromptConfig, PromptOnly


@final
class KroneckerPrompt(PromptOnly):
    """`P = scale * left ⊗ right`."""

    def __init__(self, left: Float[Tensor, "block wide"], right: Float[Tensor, "rest narrow"], scale: float) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.scale = scale

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The product."""
        return self.scale * torch.kron(self.left, self.right)


@final
@dataclass(frozen=True, kw_only=True)
class Kronecker(PromptConfig):
    """`P = A ⊗ B`: a prompt as the Kronecker product of two small matrices."""

    block: int = 4
    """Rows and columns of the left factor; it divides the length and the width."""

    @classmethod
    def published(cls) -> "Kronecker":
        """The same."""
        return cls()

    def build(self, host: Host, generator: torch.Generator) -> KroneckerPrompt:
        """Normal factors, so that the product has the host's size."""
        left = torch.randn(self.block, self.block, generator=generator)
        right = torch.randn(self.length // self.block, host.dim // self.block, generator=generator)
        return KroneckerPrompt(left, right, host.rms)

    def count(self, dim: int) -> int:
        """`block^2 + length * dim / block^2`."""
        return self.block**2 + self.length * dim // self.block**2
