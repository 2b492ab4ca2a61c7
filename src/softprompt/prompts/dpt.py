"""Decomposed prompt tuning: the prompt is a product of two thin matrices."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly, at_least
from softprompt.prompts.init import Init, check_init, check_scale, factorise, initial_rows


@final
class DecomposedPrompt(PromptOnly):
    """`P = scale * left @ right`."""

    scale: Tensor

    def __init__(self, left: Float[Tensor, "prompt rank"], right: Float[Tensor, "rank dim"], scale: float) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The product in the host's units; its rank is at most that of the factors."""
        return self.scale * (self.left @ self.right)


def decomposed(
    left: Float[Tensor, "prompt rank"],
    right: Float[Tensor, "rank dim"],
    unit: float,
    scale: float | None = None,
) -> DecomposedPrompt:
    """The prompt `unit * left @ right`, its factors at unit size or, given a `scale`, sharing what that leaves."""
    if scale is None:
        return DecomposedPrompt(left / _rms(left), right / _rms(right), unit * _rms(left) * _rms(right))
    share = (unit / scale) ** 0.5
    return DecomposedPrompt(left * share, right * share, scale)


@final
@dataclass(frozen=True, kw_only=True)
class DPT(PromptConfig):
    """`P = A B`, `rank * (length + dim)` numbers, `rank` far below both.

    Costs one product a step, nothing after folding. Guarantees a prompt of rank at most `rank`.
    Reference: Xiao et al. 2023, "Decomposed Prompt Tuning via Low-Rank Reparameterization"; `left` is their A
    and `right` their B, transposed as in their code (`[length, rank] @ [rank, dim]`).
    Differs: both factors are kept at unit size and a constant carries the product to the host's embedding RMS, so
    that one learning rate fits every backbone; it starts from the best rank-`rank` part of vocabulary rows; and its
    length is 20 and not 100, where rank 10 lost four points to the plain prompt (docs/results/study).
    `init=uniform` with `scale=1` is the published parameterisation: both factors U(-0.5, 0.5), nothing else.

    >>> DPT(length=100, rank=10).count(768)
    8680
    """

    length: int = 20
    """Virtual tokens in front of the input."""
    rank: int = 10
    """Width of the two factors."""
    init: Init = "vocab"
    """Where the first values come from; all but `uniform` by truncated SVD."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """Size of one unit of the product; none: chosen from the host's embedding RMS."""

    def check(self) -> None:
        """A rank that the length allows."""
        super().check()
        at_least(1, rank=self.rank)
        if self.rank > self.length:
            raise ValueError(
                f"rank is {self.rank} and length is {self.length}; a prompt's rank cannot exceed its length, "
                "raise the length, lower the rank, or use the method plain"
            )
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "DPT":
        """Length 100 and rank 10, both factors U(-0.5, 0.5): entries of the prompt spread by sqrt(rank) / 12."""
        return cls(length=100, rank=10, init="uniform", scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> DecomposedPrompt:
        """Uniform factors as published, or the truncated SVD of initial rows.

        Raises:
            ValueError: the rank exceeds the host's width.
        """
        if self.rank > host.dim:
            raise ValueError(f"rank is {self.rank}, but the backbone's embeddings are {host.dim} wide; lower the rank")
        if self.init == "uniform" and host.start is None:
            left = torch.rand(self.length, self.rank, generator=generator) - 0.5
            right = torch.rand(self.rank, host.dim, generator=generator) - 0.5
            return DecomposedPrompt(left, right, host.rms if self.scale is None else self.scale)
        rows = initial_rows(self.init, self.init_text, self.length, host, generator)
        left, right = factorise(rows, self.rank, generator)
        return decomposed(left, right, host.rms, self.scale)

    def count(self, dim: int) -> int:
        """`rank * (length + dim)`."""
        return self.rank * (self.length + dim)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
