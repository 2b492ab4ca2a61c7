"""Plain prompt tuning: every entry of the prompt is a parameter."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly
from softprompt.prompts.initialization import Init, check_init, check_scale, initial_matrix


@final
class PlainPrompt(PromptOnly):
    """`P = scale * matrix`."""

    scale: Tensor

    def __init__(self, matrix: Float[Tensor, "prompt dim"], scale: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The matrix in the host's units."""
        return self.scale * self.matrix


@final
@dataclass(frozen=True, kw_only=True)
class Plain(PromptConfig):
    """`P` itself, `length * dim` parameters.

    Reference: Lester, Al-Rfou and Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
    Differs: the matrix is kept in units of the host's embedding RMS, so that one learning rate fits every backbone;
    `scale=1` is the published parameterization.

    >>> Plain(length=100).count(768)
    76800
    """

    init: Init = "vocab"
    """Source of the initial values."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """What 1.0 in the trained matrix means in embedding space; None: the host's embedding RMS."""

    def check(self) -> None:
        """Refuse lengths, scales and initial values that cannot work."""
        super().check()
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "Plain":
        """100 vectors of the vocabulary, trained as they are."""
        return cls(length=100, init="vocab", scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> PlainPrompt:
        """Start from `init`, whatever the scale; `uniform` is U(-0.5, 0.5) in units of the scale."""
        scale = host.rms if self.scale is None else self.scale
        return PlainPrompt(initial_matrix(self.init, self.init_text, self.length, host, generator, scale), scale)

    def count(self, dim: int) -> int:
        """`length * dim`."""
        return self.length * dim
