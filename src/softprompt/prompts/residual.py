"""Residual prompt tuning: a small network with a skip connection re-parameterizes the prompt."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly, at_least
from softprompt.prompts.initialization import Init, check_init, check_scale, initial_matrix


@final
class ResidualPrompt(PromptOnly):
    """`P' = scale * (matrix + LayerNorm(ReLU(matrix @ down + down_bias) @ up + up_bias))`.

    All but `matrix` have a leading axis of networks: one for all positions, or one per position.

    Args:
        matrix: P.
        networks: 1, or the prompt's length.
        width: hidden size of a network.
        gain: the layer norm's initial gain; at 0 the prompt starts at the matrix.
        scale: size of one unit of the matrix and of the branch.
        generator: draws the networks' first values.
    """

    scale: Tensor

    def __init__(
        self,
        matrix: Float[Tensor, "prompt dim"],
        networks: int,
        width: int,
        gain: float,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        dim = matrix.shape[1]
        self.matrix = nn.Parameter(matrix)
        # torch's own init of a linear layer, as in the published code: U(+-1/sqrt(inputs)).
        self.down = nn.Parameter(_uniform(dim, generator, networks, dim, width))
        self.down_bias = nn.Parameter(_uniform(dim, generator, networks, 1, width))
        self.up = nn.Parameter(_uniform(width, generator, networks, width, dim))
        self.up_bias = nn.Parameter(_uniform(width, generator, networks, 1, dim))
        self.gain = nn.Parameter(torch.full((networks, 1, dim), gain))
        self.bias = nn.Parameter(torch.zeros(networks, 1, dim))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The matrix plus its normalized branch, in the host's units."""
        networks, _, dim = self.up.shape
        # [1, length, dim] for a shared network, [length, 1, dim] for one per position: no network is ever copied.
        vectors = self.matrix.view(networks, -1, dim)
        activations = torch.relu(vectors @ self.down + self.down_bias)
        branch = nn.functional.layer_norm(activations @ self.up + self.up_bias, (dim,))
        return self.scale * (vectors + branch * self.gain + self.bias).view(-1, dim)


@final
@dataclass(frozen=True, kw_only=True)
class Residual(PromptConfig):
    """`P' = P + LayerNorm(W_up ReLU(W_down P + b1) + b2)`, `2*dim*width + width + 3*dim + dim*length` parameters.

    Costs a two-layer network per step, nothing after folding; a finished prompt has `length * dim` entries.
    Reference: Razdaibiedina et al. 2023, "Residual Prompt Tuning: Improving Prompt Tuning with Residual
    Reparameterization".
    Differs: P and the branch are both kept at unit size and a constant carries their sum to the host's embedding
    RMS, so that one learning rate fits every backbone (`scale=1` is the published form); a warm start, which the paper
    does not have, is kept exactly by a layer norm whose gain starts at 0; the network is saved with the prompt, which
    the published code forgets; the count includes the biases, which the paper's leaves out.

    >>> Residual(length=100, width=400).count(1024)
    925072
    """

    width: int = 400
    """Hidden size of the network."""
    shared: bool = True
    """One network for all positions; else one per position, with `length` times the parameters."""
    init: Init = "vocab"
    """Source of the matrix's initial values."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """What 1.0 in the matrix and the branch means in embedding space; None: the host's embedding RMS."""

    def check(self) -> None:
        """Refuse widths, scales and initial values that cannot work."""
        super().check()
        at_least(1, width=self.width)
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "Residual":
        """Length 100 and width 400, as in the papers' comparisons (the code's own defaults are 10 and 800)."""
        return cls(length=100, width=400, init="vocab", scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> ResidualPrompt:
        """Initial vectors and a random network: the branch starts at unit size, so P' starts apart from P.

        With a warm start the branch starts at zero, so P' starts there.
        """
        scale = host.rms if self.scale is None else self.scale
        matrix = initial_matrix(self.init, self.init_text, self.length, host, generator, scale)
        gain = 1.0 if host.start is None else 0.0
        return ResidualPrompt(matrix, 1 if self.shared else self.length, self.width, gain, scale, generator)

    def count(self, dim: int) -> int:
        """The matrix, and each network with its biases and layer norm."""
        network = 2 * dim * self.width + self.width + 3 * dim
        return dim * self.length + network * (1 if self.shared else self.length)


def _uniform(inputs: int, generator: torch.Generator, *shape: int) -> Tensor:
    bound = inputs**-0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
