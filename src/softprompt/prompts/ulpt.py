"""Ultra-low-dimensional prompt tuning: thin vectors through a frozen random projection, then one scale and shift."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly, at_least
from softprompt.prompts.initialization import check_scale, warm_start


@final
class ProjectedPrompt(PromptOnly):
    """`P = scale * ((latent @ projection) * gain + bias)`, the projection frozen."""

    projection: Tensor
    scale: Tensor

    def __init__(
        self,
        latent: Float[Tensor, "prompt rank"],
        projection: Float[Tensor, "rank dim"],
        bias: Float[Tensor, " dim"],
        scale: float,
    ) -> None:
        super().__init__()
        self.latent = nn.Parameter(latent)
        self.gain = nn.Parameter(torch.ones(projection.shape[1]))
        self.bias = nn.Parameter(bias)
        # Saved: the same seed may draw other values in another version of torch.
        self.register_buffer("projection", projection)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The projected vectors, scaled and shifted, in the host's units."""
        return self.scale * ((self.latent @ self.projection) * self.gain + self.bias)


@final
@dataclass(frozen=True, kw_only=True)
class ULPT(PromptConfig):
    """`e_i = (z_i P~) * s + b`, P~ random and frozen: `length * rank + 2 * dim` parameters.

    Costs one product per step, nothing after folding; on disk it also has the projection, `rank * dim` entries.
    Reference: Wu et al. 2025, "Ultra-Low-Dimensional Prompt Tuning via Random Projection"; `latent` is their Z,
    `projection` their P~, `gain` and `bias` their s and b, `rank` their r.
    Differs: P~ is N(0, 1) as in the paper, divided by `sqrt(rank)` and in units of the host's embedding RMS, so that
    the first prompt is at the host's size and one learning rate fits every backbone; with a `scale` it is
    Xavier-uniform times that scale (`scale=1` is their code). A warm start becomes the nearest prompt that the
    projection can represent (`s = 1`, `b` its mean row).

    >>> ULPT(length=100, rank=64).count(768)
    7936
    """

    rank: int = 64
    """Width of the trained vectors; may exceed the length."""
    scale: float | None = None
    """What 1.0 in the projected vectors means in embedding space; None: chosen from the host's embedding RMS."""

    def check(self) -> None:
        """Refuse ranks and scales that cannot work."""
        super().check()
        at_least(1, rank=self.rank)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "ULPT":
        """Length 100 and rank 64, Z ~ N(0, 1) and P~ Xavier uniform."""
        return cls(length=100, rank=64, scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> ProjectedPrompt:
        """Normal vectors through a random projection, `s = 1` and `b = 0`; or the least-squares fit to a warm start."""
        latent = torch.randn(self.length, self.rank, generator=generator)
        if self.scale is None:
            projection, scale = torch.randn(self.rank, host.dim, generator=generator) / self.rank**0.5, host.rms
        else:
            bound = (6 / (self.rank + host.dim)) ** 0.5
            projection = torch.empty(self.rank, host.dim).uniform_(-bound, bound, generator=generator)
            scale = self.scale
        bias = torch.zeros(host.dim)
        if host.start is not None:
            start = warm_start(host, self.length) / scale
            bias = start.mean(0)
            fit = torch.linalg.lstsq(projection.double().T, (start - bias).double().T)
            latent = fit.solution.T.float().contiguous()
        return ProjectedPrompt(latent, projection, bias, scale)

    def count(self, dim: int) -> int:
        """`length * rank + 2 * dim`."""
        return self.length * self.rank + 2 * dim
