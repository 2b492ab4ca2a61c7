"""Burstiness against numpy, scipy or the definition."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from softprompt import Backbone, Host
from softprompt.analysis.rank import Distribution, burstiness, whitened
from softprompt.backbones.projections import QueryKey
from softprompt.prompts.bpt import whitening

MakeBackbone = Callable[[str], Backbone]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def host(rows: torch.Tensor) -> Host:
    return Host(embedding=rows, encode=lambda text: [0])


def test_whitened_equals_the_whitening_matrix() -> None:
    for count in (30, 500):  # fewer and more than the width
        rows = torch.randn(count, 40, generator=seeded(3)) * torch.linspace(0.01, 3, 40)
        torch.testing.assert_close(whitened(rows, 1e-3), rows @ whitening(rows, 1e-3), rtol=1e-4, atol=1e-4)


def test_whitened_has_identity_covariance() -> None:
    rows = torch.randn(500, 40, generator=seeded(4)) @ torch.randn(40, 40, generator=seeded(5))
    found = whitened(rows, 1e-9).double()
    torch.testing.assert_close(found.T @ found / 500, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-3)
    flat = whitened(torch.ones(50, 1) @ torch.randn(1, 40, generator=seeded(6)), 1e-3)
    assert bool(flat.isfinite().all())


def test_distribution_equals_scipy() -> None:
    values = torch.from_numpy(stats.laplace.rvs(size=(200, 300), random_state=0)).float()
    found, flat = Distribution.of(values), values.double().numpy().ravel()
    assert found.kurtosis == pytest.approx(stats.kurtosis(flat, fisher=False), rel=1e-9)
    assert found.kurtosis == pytest.approx(6, abs=0.3)
    assert found.beyond == pytest.approx(np.exp(-3 * np.sqrt(2)), abs=0.002)
    expected = (np.quantile(flat, list(found.quantiles)) - flat.mean()) / flat.std()
    np.testing.assert_allclose(list(found.quantiles.values()), expected, atol=0.01)  # steps between 60,000 numbers
    assert sum(found.density) * 0.1 == pytest.approx(1, abs=0.001)
    with pytest.raises(ValueError, match="all values are the same"):
        Distribution.of(torch.ones(3, 3))


def test_burstiness_of_the_papers_product(tiny_backbone: MakeBackbone) -> None:
    rows = torch.randn(64, 16, generator=seeded(7))
    query, key = torch.randn(2, 3, 8, 16, generator=seeded(8))
    found = burstiness(host(rows), QueryKey(query=query, key=key), samples=64)
    flat_query, flat_key = query.reshape(24, 16).T.numpy(), key.reshape(24, 16).T.numpy()  # the paper's W_q, W_k
    products = flat_query @ flat_key.T @ rows.numpy().T
    assert found.products.before.kurtosis == pytest.approx(stats.kurtosis(products, None, fisher=False), rel=1e-4)
    head = query[1].T.numpy() @ key[1].numpy() @ rows.numpy().T
    assert found.heads[1].before.kurtosis == pytest.approx(stats.kurtosis(head, None, fisher=False), rel=1e-4)
    assert found.inputs.before.kurtosis == pytest.approx(stats.kurtosis(rows.numpy(), None, fisher=False), rel=1e-4)


def test_whitening_removes_heavy_tails() -> None:
    """Directions of very unequal size make the entries bursty, though each one alone is Gaussian."""
    rows = torch.randn(2000, 32, generator=seeded(9)) * torch.logspace(-0.5, 1, 32)
    eye = torch.eye(32)[None]
    found = burstiness(host(rows), QueryKey(query=eye, key=eye), samples=2000)
    assert found.products.before.kurtosis > 8
    assert found.products.after.kurtosis == pytest.approx(3, abs=0.3)


def test_burstiness_refuses_too_few_or_wrong_inputs() -> None:
    rows, eye = torch.randn(20, 8, generator=seeded(1)), torch.eye(8)[None]
    with pytest.raises(ValueError, match="samples is 1; a distribution needs at least 2"):
        burstiness(host(rows), QueryKey(query=eye, key=eye), samples=1)
    with pytest.raises(ValueError, match="the inputs are 8 wide and the first query projection takes 16"):
        burstiness(host(rows), QueryKey(query=torch.eye(16)[None], key=torch.eye(16)[None]))
