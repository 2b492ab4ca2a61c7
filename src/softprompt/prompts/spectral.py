"""A prompt as its singular value decomposition, whose values training can switch off: it shows the rank needed."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly
from softprompt.prompts.initialization import Init, check_init, check_scale, initial_matrix


@final
class SpectralPrompt(PromptOnly):
    """`P = scale * left @ diag(ReLU(values - threshold)) @ right`."""

    scale: Tensor
    threshold: Tensor

    def __init__(
        self,
        left: Float[Tensor, "prompt rank"],
        values: Float[Tensor, " rank"],
        right: Float[Tensor, "rank dim"],
        scale: float,
        threshold: float,
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.values = nn.Parameter(values)
        self.right = nn.Parameter(right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The product of the directions above the threshold, in the host's units."""
        return self.scale * ((self.left * self._positive()) @ self.right)

    def rank(self) -> int:
        """The number of values above the threshold: a bound on the rank of the prompt."""
        return int((self._positive() > 0).sum())

    def _positive(self) -> Float[Tensor, " rank"]:
        return torch.relu(self.values - self.threshold)


@final
@dataclass(frozen=True, kw_only=True)
class Spectral(PromptConfig):
    """`P = U diag(ReLU(s)) V`, `k * (length + dim + 1)` parameters with `k = min(length, dim)`.

    A pilot for DPT: train it, read its rank (`softprompt rank RUN`), and continue with a DPT of that rank and the same
    length (`train --init-prompt RUN ... dpt --anchor none --rank R`). ReLU can only switch values off: one that a step
    carries to zero has no gradient and never recovers. The rank therefore never grows, and part of its fall is the
    optimizer's noise and not the task; compare the spectrum of `plain` after the same training. For more pressure, set
    a `threshold`: values start that far above it, and weight decay pulls those that the task does not need below.
    Reference: the pilot study of Xiao et al. 2023, "Decomposed Prompt Tuning via Low-Rank Reparameterization".
    Differs: the study's code was never published, so the start (the SVD of initial vectors, at full rank) is ours; the
    three factors are kept at unit size and a constant carries the product to the host's embedding RMS (`scale=1`
    keeps U and V orthonormal and s in the host's units); the threshold is ours, and 0 is the published form.

    >>> Spectral(length=100).count(768)
    86900
    """

    threshold: float = 0.0
    """What a singular value must exceed to count, in units of the values' initial root mean square."""
    init: Init = "vocab"
    """Source of the initial vectors, whose decomposition is the start."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """What 1.0 in the product of the factors means in embedding space; None: chosen from the host's embedding RMS."""

    def check(self) -> None:
        """Refuse thresholds, scales and initial values that cannot work."""
        super().check()
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold is {self.threshold}; it must be at least 0 and finite")
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "Spectral":
        """Length 100, no threshold, and plain orthonormal factors."""
        return cls(length=100, scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> SpectralPrompt:
        """The singular value decomposition of initial vectors; directions that they lack are off from the start."""
        scale = host.rms if self.scale is None else self.scale
        vectors = initial_matrix(self.init, self.init_text, self.length, host, generator, scale)
        left, values, right = torch.linalg.svd(vectors.double(), full_matrices=False)
        values = torch.where(values > values[0] * 1e-6, values, 0)
        size = float(values.square().mean().sqrt())
        threshold = self.threshold * size
        if self.scale is None:
            tall, wide = left.shape[0] ** 0.5, right.shape[1] ** 0.5
            left, values, right, threshold = left * tall, values / size, right * wide, self.threshold
            scale = host.rms * size / (tall * wide)
        values = values + threshold
        return SpectralPrompt(left.float().contiguous(), values.float(), right.float().contiguous(), scale, threshold)

    def count(self, dim: int) -> int:
        """`min(length, dim) * (length + dim + 1)`."""
        return min(self.length, dim) * (self.length + dim + 1)
