"""How heavy the tails are of what a model's first attention makes of its inputs, before and after whitening."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.projections import QueryKey
from softprompt.prompts import Host

_SHARES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_BINS, _EDGE = 120, 6.0
GAUSSIAN = {"kurtosis": 3.0, "beyond": 0.0026998}
"""The two measures of a normal distribution."""


@final
@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Many numbers as a distribution; everything but mean and spread is in units of its standard deviation."""

    count: int
    mean: float
    spread: float
    """Standard deviation."""
    kurtosis: float
    """`E[(x - mean)^4] / spread^4`: 3 for a Gaussian, 6 for a Laplacian, more for heavier tails."""
    beyond: float
    """Share of the numbers beyond three standard deviations: 0.0027 for a Gaussian, 0.0144 for a Laplacian."""
    quantiles: Mapping[float, float]
    """The number below which a share lies, less the mean, in standard deviations."""
    density: tuple[float, ...]
    """Of equal bins from -6 to 6 standard deviations; what lies outside is in `beyond` alone."""

    @classmethod
    def of(cls, values: Float[Tensor, "..."]) -> "Distribution":
        """The distribution of all entries.

        Raises:
            ValueError: the entries are all the same.
        """
        flat = values.detach().double().flatten()
        mean, spread = flat.mean(), flat.std(correction=0)
        if not spread > 0:
            raise ValueError("all values are the same and have no distribution; give inputs that differ")
        unit = (flat - mean) / spread
        # torch.quantile refuses more than 2^24 numbers.
        ordered = unit.sort().values
        places = [round(share * (len(ordered) - 1)) for share in _SHARES]
        counts = torch.histc(unit, bins=_BINS, min=-_EDGE, max=_EDGE)
        return cls(
            count=len(flat),
            mean=float(mean),
            spread=float(spread),
            kurtosis=float(unit.pow(4).mean()),
            beyond=float((unit.abs() > 3).double().mean()),
            quantiles={share: float(ordered[place]) for share, place in zip(_SHARES, places, strict=True)},
            density=tuple((counts / len(flat) / (2 * _EDGE / _BINS)).tolist()),
        )


def bin_centres() -> list[float]:
    """Where the bins of `Distribution.density` are, in standard deviations."""
    width = 2 * _EDGE / _BINS
    return [-_EDGE + width * (place + 0.5) for place in range(_BINS)]


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """A distribution before whitening, and after it."""

    before: Distribution
    after: Distribution


@final
@dataclass(frozen=True, kw_only=True)
class Burstiness:
    """The distributions that BPT's paper argues from."""

    inputs: Pair
    """Entries of the input vectors `X`."""
    products: Pair
    """Entries of `X W_q W_k^T`, all heads together: what a prompt's vectors are multiplied with."""
    heads: tuple[Pair, ...]
    """The same, head by head, each whitened by itself."""
    query: Distribution
    """Entries of `W_q`."""
    key: Distribution


def burstiness(
    host: Host, projections: QueryKey, *, samples: int = 1000, seed: int = 0, eps: float = 1e-3
) -> Burstiness:
    """Distributions of `X` and of the products `X~ = X (W_q W_k^T)^T`, and of both times `(Sigma + eps I)^(-1/2)`.

    A query `p W_q` meets a key `x W_k` as `p . x~`, so the entries of `x~` are query-key products of an input with each
    unit direction that a prompt can have. Costs a singular value decomposition of `samples x dim` numbers, and one a
    head. What the layer does to its input before the projections (a norm, positions) is left out, as in the paper.

    Args:
        host: its `sample` gives the inputs.
        projections: of the first attention.
        samples: input vectors.
        seed: of their draw.
        eps: added to the variances that are whitened, in units of their mean.

    Raises:
        ValueError: too few samples, or projections that take inputs of another width.

    Reference: Wang, Duan and Kong 2025, "Attention to the Burstiness in Visual Prompt Tuning!".
    Differs: with eps, without which the products of one head, whose rank is below `dim`, have no whitening.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; a distribution needs at least 2")
    if projections.query.shape[2] != host.dim:
        raise ValueError(
            f"the inputs are {host.dim} wide and the first query projection takes {projections.query.shape[2]}: this "
            "model widens its embeddings in between, and what it multiplies them with is not known"
        )
    rows = host.sample(samples, torch.Generator().manual_seed(seed))
    heads = zip(projections.query, projections.key, strict=True)
    return Burstiness(
        inputs=_pair(rows, eps),
        products=_pair(rows @ projections.product().T, eps),
        heads=tuple(_pair(rows @ key.T @ query, eps) for query, key in heads),
        query=Distribution.of(projections.query),
        key=Distribution.of(projections.key),
    )


def _pair(rows: Float[Tensor, "sample dim"], eps: float) -> Pair:
    return Pair(before=Distribution.of(rows), after=Distribution.of(whitened(rows, eps)))


def whitened(rows: Float[Tensor, "sample dim"], eps: float) -> Float[Tensor, "sample dim"]:
    """`X W` with `W = (Sigma + eps * mean eigenvalue * I)^(-1/2)` and `Sigma = X^T X / n`, without making `W`.

    Raises:
        ValueError: every row is zero.
    """
    left, values, right = torch.linalg.svd(rows.double(), full_matrices=False)
    variances = values.square() / rows.shape[0]
    floor = eps * variances.sum() / rows.shape[1]
    if not floor > 0:
        raise ValueError("every input vector is zero, which cannot be whitened; give other inputs")
    return ((left * (values * (variances + floor).rsqrt())) @ right).to(rows.dtype)
