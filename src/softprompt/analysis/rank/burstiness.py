"""The tails of a model's inputs and of their query-key products in the first attention, before and after whitening."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.projections import QueryKey
from softprompt.prompts import Host

_PROBABILITIES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_BINS, _EDGE = 120, 6.0


@final
@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Summary of a set of values; all but mean and spread are in units of the standard deviation."""

    count: int
    mean: float
    spread: float
    """Standard deviation."""
    kurtosis: float
    """`E[(x - mean)^4] / spread^4`: 3 for a Gaussian, 6 for a Laplacian, larger for heavier tails."""
    beyond: float
    """Share of values beyond three standard deviations: 0.0027 for a Gaussian, 0.0144 for a Laplacian."""
    quantiles: Mapping[float, float]
    """By probability; the mean is subtracted."""
    density: tuple[float, ...]
    """Of equal bins from -6 to 6 standard deviations; values outside count only in `beyond`."""

    @classmethod
    def of(cls, values: Float[Tensor, "..."]) -> "Distribution":
        """Summarize all entries.

        Raises:
            ValueError: all entries are equal.
        """
        flat = values.detach().double().flatten()
        mean, spread = flat.mean(), flat.std(correction=0)
        if not spread > 0:
            raise ValueError("all values are the same and have no distribution; give inputs that differ")
        unit = (flat - mean) / spread
        # torch.quantile refuses more than 2^24 values.
        ordered = unit.sort().values
        indices = [round(probability * (len(ordered) - 1)) for probability in _PROBABILITIES]
        counts = torch.histc(unit, bins=_BINS, min=-_EDGE, max=_EDGE)
        return cls(
            count=len(flat),
            mean=float(mean),
            spread=float(spread),
            kurtosis=float(unit.pow(4).mean()),
            beyond=float((unit.abs() > 3).double().mean()),
            quantiles={
                probability: float(ordered[index]) for probability, index in zip(_PROBABILITIES, indices, strict=True)
            },
            density=tuple((counts / len(flat) / (2 * _EDGE / _BINS)).tolist()),
        )


def bin_centers() -> list[float]:
    """The centers of the bins of `Distribution.density`, in standard deviations."""
    width = 2 * _EDGE / _BINS
    return [-_EDGE + width * (index + 0.5) for index in range(_BINS)]


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """A distribution before and after whitening."""

    before: Distribution
    after: Distribution


@final
@dataclass(frozen=True, kw_only=True)
class Burstiness:
    """The distributions on which BPT's paper bases its argument."""

    inputs: Pair
    """Entries of the input vectors `X`."""
    products: Pair
    """Entries of `X W_q W_k^T`, all heads together: the vectors that a prompt's vectors are multiplied with."""
    heads: tuple[Pair, ...]
    """The same per head, each whitened by itself."""
    query: Distribution
    """Entries of `W_q`."""
    key: Distribution
    """Entries of `W_k`."""


def burstiness(
    host: Host, projections: QueryKey, *, samples: int = 1000, seed: int = 0, eps: float = 1e-3
) -> Burstiness:
    """Distributions of `X` and of the products `X~ = X (W_q W_k^T)^T`, and of both times `(Sigma + eps I)^(-1/2)`.

    The product of a query `p W_q` and a key `x W_k` is `p . x~`, so the entries of `x~` are the query-key products of
    an input with each unit direction that a prompt can have. Costs a singular value decomposition of a `samples x dim`
    matrix, and one per head. A norm or positions before the projections are ignored, as in the paper.

    Args:
        host: provides the inputs by its `sample`.
        projections: those of the first attention.
        samples: number of input vectors.
        seed: seed of the sample.
        eps: added to the variances before whitening, in units of their mean.

    Raises:
        ValueError: fewer than 2 samples, or projections that take inputs of another width.

    Reference: Wang, Duan and Kong 2025, "Attention to the Burstiness in Visual Prompt Tuning!".
    Differs: eps, without which the products of one head cannot be whitened, since their rank is below `dim`.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; a distribution needs at least 2")
    if projections.query.shape[2] != host.dim:
        raise ValueError(
            f"the inputs are {host.dim} wide and the first query projection takes {projections.query.shape[2]}: this "
            "model widens its embeddings in between, which is not supported; choose another backbone"
        )
    vectors = host.sample(samples, torch.Generator().manual_seed(seed))
    heads = zip(projections.query, projections.key, strict=True)
    return Burstiness(
        inputs=_pair(vectors, eps),
        products=_pair(vectors @ projections.product().T, eps),
        heads=tuple(_pair(vectors @ key.T @ query, eps) for query, key in heads),
        query=Distribution.of(projections.query),
        key=Distribution.of(projections.key),
    )


def _pair(vectors: Float[Tensor, "sample dim"], eps: float) -> Pair:
    return Pair(before=Distribution.of(vectors), after=Distribution.of(whitened(vectors, eps)))


def whitened(vectors: Float[Tensor, "sample dim"], eps: float) -> Float[Tensor, "sample dim"]:
    """`X W` with `W = (Sigma + eps * mean eigenvalue * I)^(-1/2)` and `Sigma = X^T X / n`, without making `W`.

    Raises:
        ValueError: every vector is zero.
    """
    left, values, right = torch.linalg.svd(vectors.double(), full_matrices=False)
    variances = values.square() / vectors.shape[0]
    floor = eps * variances.sum() / vectors.shape[1]
    if not floor > 0:
        raise ValueError("every input vector is zero, which cannot be whitened; give other inputs")
    return ((left * (values * (variances + floor).rsqrt())) @ right).to(vectors.dtype)
