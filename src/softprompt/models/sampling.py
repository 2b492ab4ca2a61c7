"""How the next token is chosen."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest, or drawn."""

    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among the k likeliest only; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this probability."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k} and top_p is {self.top_p}; they must be >= 0 and in (0, 1]")


@final
class Chooser:
    """The next token of each row, greedy or drawn from a seeded generator."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._warpers = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self._warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []

    def __call__(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        """One token a row."""
        if self._sampling.temperature == 0:
            return logits.argmax(-1)
        # Colder than this, any two logits that differ are far apart, and dividing by less overflows to NaN.
        scores = logits.float() / max(self._sampling.temperature, 1e-6)
        for warper in self._warpers:
            scores = warper(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0]
