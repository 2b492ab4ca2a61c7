"""Singular values of a prompt's matrix, the three ranks they define, and truncated SVD."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values `s_1 >= s_2 >= ...` of a matrix, and its ranks; all three are 0 for a matrix of zeros.

    >>> Spectrum.of(torch.diag(torch.tensor([3.0, 3.0, 0.0]))).numerical
    2
    """

    values: tuple[float, ...]
    """In descending order."""
    tolerance: float
    """Values up to this one count as rounding error."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "prompt dim"], size: float = 0.0) -> "Spectrum":
        """The spectrum of `matrix`, decomposed in float64.

        Args:
            matrix: its entries are taken to be float32, as prompts are stored.
            size: for a difference of two matrices, the largest singular value of either, whose rounding remains in it.
        """
        values = torch.linalg.svdvals(matrix.detach().double().cpu())
        unit = max(matrix.shape) * torch.finfo(torch.float32).eps
        return cls(values=tuple(values.tolist()), tolerance=max(float(values[0]), size) * unit)

    @property
    def numerical(self) -> int:
        """The number of `s_i > s_1 * max(length, dim) * 2^-23`.

        Reference: numpy.linalg.matrix_rank, after Press et al. 2007, "Numerical Recipes", section 2.6.
        Differs: the tolerance is float32's, the decomposition float64.
        """
        return sum(value > self.tolerance for value in self.values)

    @property
    def stable(self) -> float:
        """`||P||_F^2 / ||P||_2^2 = sum_i s_i^2 / s_1^2`: small where one direction has most of the norm.

        Reference: Rudelson and Vershynin 2007, "Sampling from Large Matrices", section 1.
        """
        largest = self.values[0]
        return sum((value / largest) ** 2 for value in self.values) if largest > 0 else 0.0

    @property
    def effective(self) -> float:
        """`exp(-sum_i p_i log p_i)` with `p_i = s_i / sum_j s_j`: the number of equal values with the same entropy.

        Reference: Roy and Vetterli 2007, "The Effective Rank: A Measure of Effective Dimensionality", definition 1.
        """
        shares = torch.tensor(self.values, dtype=torch.float64)
        if not shares.sum() > 0:
            return 0.0
        return float(torch.special.entr(shares / shares.sum()).sum().exp())


def truncated_svd(matrix: Float[Tensor, "prompt dim"], rank: int) -> Float[Tensor, "prompt dim"]:
    """The nearest matrix of at most `rank`: the first `rank` terms of the singular value decomposition.

    Raises:
        ValueError: a rank below 0 or above the smaller dimension.

    Reference: Eckart and Young 1936, "The Approximation of One Matrix by Another of Lower Rank".
    """
    if not 0 <= rank <= min(matrix.shape):
        raise ValueError(
            f"rank is {rank}; a matrix of {tuple(matrix.shape)} can be truncated to rank 0 to {min(matrix.shape)}"
        )
    left, values, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).to(matrix.dtype)
