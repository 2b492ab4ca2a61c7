"""An anchored DPT, and ULPT, against their formulas; the product alone against what it was before anchors."""

import dataclasses
import hashlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.prompts import Host
from softprompt.prompts.bpt import BPT
from softprompt.prompts.dpt import DPT, AnchoredPrompt
from softprompt.prompts.initialization import factorize, gradient_factors
from softprompt.prompts.plain import Plain
from softprompt.prompts.ulpt import ULPT

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
VOCAB, DIM, LENGTH, RANK = 60, 16, 6, 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slope() -> Tensor:
    """What the host gives as the gradient, whatever the prompt."""
    return torch.randn(LENGTH, DIM, generator=seeded(11))


def host(**facts: Any) -> Host:
    known: dict[str, Any] = {
        "embedding": 0.14 * torch.randn(VOCAB, DIM, generator=seeded(5)),
        "encode": lambda text: [ord(letter) % VOCAB for letter in text],
        "label_words": ("yes", "no"),
        "special": frozenset({0, 1}),
        "gradient": lambda rows, batches: slope(),
    }
    return Host(**{**known, **facts})


ANCHORS: dict[str, dict[str, Any]] = {
    "vocab": {},
    "text": {"anchor": "text", "init_text": "good"},
    "label_words": {"anchor": "label_words"},
    "gradient": {"factor_init": "gradient"},
    "gradient at a text": {"factor_init": "gradient", "anchor": "text", "init_text": "so"},
    "own scale": {"scale": 0.7},
}
anchors = pytest.mark.parametrize("settings", ANCHORS.values(), ids=ANCHORS.keys())


def built(settings: dict[str, Any], facts: Host | None = None) -> AnchoredPrompt:
    prompt = DPT(length=LENGTH, rank=RANK, **settings).build(facts or host(), seeded(2))
    assert isinstance(prompt, AnchoredPrompt)
    return prompt


@anchors
def test_anchored_dpt_matches_its_formula(settings: dict[str, Any]) -> None:
    facts = host()
    ours = built(settings)
    first_left, first_right = ours.first_left.double(), ours.first_right.double()
    start = ours.prompt().detach().double()
    with torch.no_grad():
        ours.left_update += torch.randn(ours.left_update.shape, generator=seeded(3))
        ours.right_update += torch.randn(ours.right_update.shape, generator=seeded(4))
    left = (first_left + ours.left_update.detach()).requires_grad_()
    right = (first_right + ours.right_update.detach()).requires_grad_()
    # rms L D / (r (D sqrt(L) + L sqrt(D))), or as large as that of a product of r normal columns
    unit = facts.rms * LENGTH * DIM / (RANK * (DIM * LENGTH**0.5 + LENGTH * DIM**0.5))
    unit = facts.rms / RANK**0.5 if "factor_init" in settings else settings.get("scale", unit)
    theirs = start + unit * (
        torch.einsum("lr,rd->ld", left, right) - torch.einsum("lr,rd->ld", first_left, first_right)
    )
    close(ours.prompt().double(), theirs)
    weights = torch.randn(LENGTH, DIM, generator=seeded(6))
    (ours.prompt() * weights).sum().backward()
    (theirs * weights.double()).sum().backward()
    for mine, expected in ((ours.left_update, left), (ours.right_update, right)):
        assert mine.grad is not None
        assert expected.grad is not None
        close(mine.grad.double(), expected.grad)


@anchors
def test_anchored_prompt_starts_exactly_at_anchor(settings: dict[str, Any]) -> None:
    facts = host()
    if "init_text" in settings:
        rows = facts.embed(settings["init_text"], LENGTH)
    elif "anchor" in settings:
        rows = facts.embed("yesno", LENGTH)
    else:
        rows = facts.sample(LENGTH, seeded(2))
    assert torch.equal(built(settings).prompt(), rows)


@pytest.mark.parametrize("settings", [{}, {"factor_init": "gradient"}], ids=["random", "gradient"])
def test_full_rank_warm_start_is_kept_exactly(settings: dict[str, Any]) -> None:
    inputs = 3 * torch.randn(LENGTH, DIM, generator=seeded(9))
    assert torch.linalg.matrix_rank(inputs) == LENGTH > RANK
    assert torch.equal(built(settings, host(start=inputs)).prompt(), inputs)


def test_anchor_is_a_copy_of_the_warm_start() -> None:
    inputs = torch.randn(LENGTH, DIM, generator=seeded(9))
    prompt = built({}, host(start=inputs))
    with torch.no_grad():
        prompt.anchor.add_(1)
    assert torch.equal(inputs, torch.randn(LENGTH, DIM, generator=seeded(9)))


def test_random_factors_are_standard_normal() -> None:
    prompt = DPT(length=400, rank=100).build(host(embedding=torch.randn(900, 500)), seeded(0))
    assert isinstance(prompt, AnchoredPrompt)
    for factor in (prompt.first_left, prompt.first_right):
        assert float(factor.mean()) == pytest.approx(0, abs=0.02)
        assert float(factor.square().mean()) == pytest.approx(1, rel=0.02)


@anchors
def test_weight_decay_returns_to_the_anchor(settings: dict[str, Any]) -> None:
    prompt = built(settings)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=1.0)
    prompt.prompt().sum().backward()
    optimizer.step()
    moved = float((prompt.prompt() - prompt.anchor).detach().norm())
    assert moved > 0
    for parameter in prompt.parameters():
        parameter.grad = None
        optimizer.state[parameter]["exp_avg"].zero_()
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    assert float((prompt.prompt() - prompt.anchor).detach().norm()) < 1e-3 * moved


@pytest.mark.parametrize(("length", "dim", "rank"), [(100, 576, 10), (20, 576, 10), (100, 64, 1), (20, 256, 20)])
def test_first_step_lowers_loss_as_much_as_plain(length: int, dim: int, rank: int) -> None:
    """To first order, at a random gradient, with Adam's first step: the sign of the gradient times the rate."""
    weights = torch.randn(length, dim, generator=seeded(1))
    lowered = []
    for config in (Plain(length=length), DPT(length=length, rank=rank)):
        prompt = config.build(host(embedding=0.14 * torch.randn(300, dim, generator=seeded(5))), seeded(0))
        gradients = torch.autograd.grad((prompt.prompt() * weights).sum(), list(prompt.parameters()))
        lowered.append(sum(float(gradient.abs().sum()) for gradient in gradients))
    plain, anchored = lowered
    assert anchored / plain == pytest.approx(1, abs=0.25 if rank == 1 else 0.1)


def test_gradient_factors_are_those_of_lora_ga() -> None:
    prompt = built({"factor_init": "gradient"})
    left, _, right = torch.linalg.svd(slope().double(), full_matrices=False)
    # A singular vector's sign is a matter of taste; its outer product with itself is not.
    ours_left, ours_right = prompt.first_left.double(), prompt.first_right.double()
    close(ours_left.T @ ours_left / LENGTH, torch.eye(RANK, dtype=torch.float64))
    close(ours_right @ ours_right.T / DIM, torch.eye(RANK, dtype=torch.float64))
    columns, rows = left[:, RANK : 2 * RANK], right[:RANK]
    close(ours_left @ ours_left.T / LENGTH, columns @ columns.T)
    close(ours_right.T @ ours_right / DIM, rows.T @ rows)


def test_gradient_factors_first_step_follows_gradient() -> None:
    """`dA = G B0^T` is the best rank-r part of G's own left directions; a random B0 has a share of it."""

    def share(left: Tensor, right: Tensor) -> float:
        moved = (slope() @ right.T) @ right + left @ (left.T @ slope())
        return float((moved * slope()).sum() / moved.norm() / slope().norm())

    random = built({})
    assert share(*gradient_factors(slope(), RANK)) > 1.2 * share(random.first_left, random.first_right)


@pytest.mark.parametrize("rank", [1, 4, LENGTH])
def test_gradient_factors_accept_any_rank(rank: int) -> None:
    left, right = gradient_factors(slope(), rank)
    assert (left.shape, right.shape) == ((LENGTH, rank), (rank, DIM))
    for factor in (left, right):
        assert float(factor.square().mean()) == pytest.approx(1)


def test_gradient_is_computed_at_anchor() -> None:
    asked: list[tuple[Tensor, int]] = []

    def gradient(rows: Tensor, batches: int) -> Tensor:
        asked.append((rows.clone(), batches))
        return slope()

    prompt = built({"factor_init": "gradient", "gradient_batches": 5}, host(gradient=gradient))
    [(rows, batches)] = asked
    assert batches == 5
    assert torch.equal(rows, prompt.anchor)
    BPT(length=LENGTH, rank=RANK, init="gradient", gradient_batches=3).build(host(gradient=gradient), seeded(0))
    assert asked[1][1] == 3


@pytest.mark.parametrize(
    "config", [DPT(length=LENGTH, rank=RANK, factor_init="gradient"), BPT(length=9, rank=3, init="gradient")]
)
@pytest.mark.parametrize(
    ("gradient", "said"),
    [
        (None, "gradient initialization needs a shallow prompt"),
        (lambda rows, batches: torch.zeros_like(rows), "is zero"),
        (lambda rows, batches: torch.full_like(rows, torch.inf), "is NaN"),
    ],
)
def test_missing_gradient_raises_instead_of_random_start(config: Any, gradient: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.build(host(gradient=gradient), seeded(0))


def test_bpt_second_factor_starts_along_gradient() -> None:
    prompt = BPT(length=LENGTH, rank=RANK, init="gradient").build(host(), seeded(0))
    rows = torch.linalg.svd(slope().double(), full_matrices=False)[2][:RANK]
    close((prompt.right.T @ prompt.right).double() / DIM, rows.T @ rows)
    published = BPT(length=LENGTH, rank=RANK, init="gradient", scale=1.0).build(host(), seeded(0)).right.detach()
    assert float(published.square().mean()) == pytest.approx(2 / (RANK + DIM))


OLD: dict[str, tuple[dict[str, Any], list[float]]] = {
    # The first three numbers of the prompt, and the sums of the prompt and of both factors, before there were anchors.
    "vocab": (
        {},
        [-0.2938362658, 0.2260346115, 0.0134047810, -0.9423566689, 3.2871717662, -8.6034067869, 0.0730217025],
    ),
    "uniform": (
        {"init": "uniform"},
        [0.0015598347, 0.0172689036, -0.0044467887, 0.0883912085, 0.2048811913, 1.6018543839, 0.1344129890],
    ),
    "text": (
        {"init": "text", "init_text": "some t"},
        [0.0833760202, 0.2361019105, -0.0508156680, 1.6403180843, 9.3486028463, 5.8782595191, 0.0643955246],
    ),
    "label_words": (
        {"init": "label_words"},
        [0.4097783864, 0.1492318958, -0.0292397514, 1.9348047912, 8.7109022923, 5.6107870550, 0.0779391751],
    ),
    "published": (
        {"init": "uniform", "scale": 1.0},
        [0.0116047915, 0.1284764558, -0.0330830291, 0.6576092568, 0.2048811913, 1.6018543839, 1.0],
    ),
    "scaled": (
        {"scale": 1.0},
        [-0.2938362658, 0.2260345817, 0.0134047791, -0.9423566959, 1.1351167094, -1.8192995004, 1.0],
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_dpt_without_anchor_matches_recorded_values(name: str) -> None:
    settings, expected = OLD[name]
    prompt = DPT(anchor="none", length=LENGTH, rank=RANK, **settings).build(host(), seeded(2))
    assert sorted(prompt.state_dict()) == ["left", "right", "scale"]
    rows = prompt.prompt().detach()
    sums = [float(values.detach().double().sum()) for values in (rows, prompt.left, prompt.right)]
    assert [*rows[0, :3].tolist(), *sums, float(prompt.scale)] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_dpt_without_anchor_uniform_init_is_unchanged(scale: float | None) -> None:
    prompt = DPT(anchor="none", length=LENGTH, rank=RANK, init="uniform", scale=scale).build(host(), seeded(2))
    own = prompt.state_dict()
    digest = hashlib.sha256(b"".join(own[name].numpy().tobytes() for name in ("left", "right"))).hexdigest()
    assert digest == "5eccc857d511b1e1dab8305878d76cc2da6a9db5f03a3493f6cac8a3345dcd9a"


@pytest.mark.parametrize("start", [None, 0.2 * torch.randn(LENGTH, DIM, generator=torch.Generator().manual_seed(9))])
def test_dpt_without_anchor_svd_init_is_unchanged(start: Tensor | None) -> None:
    facts, draw = host(start=start), seeded(2)
    rows = (facts.sample(LENGTH, draw) if start is None else start) / facts.rms
    left, right = factorize(rows, RANK, draw)
    sizes = [float(factor.square().mean().sqrt()) for factor in (left, right)]
    prompt = DPT(anchor="none", length=LENGTH, rank=RANK).build(facts, seeded(2))
    assert torch.equal(prompt.left, left / sizes[0])
    assert torch.equal(prompt.right, right / sizes[1])
    assert float(prompt.scale) == float(torch.tensor(facts.rms * sizes[0] * sizes[1]))


def test_published_dpt_is_the_papers_product() -> None:
    config = DPT.published()
    assert (config.anchor, config.init, config.scale, config.length, config.rank) == ("none", "uniform", 1.0, 100, 10)
    prompt = config.build(host(), seeded(0))
    assert sorted(prompt.state_dict()) == ["left", "right", "scale"]
    assert torch.equal(prompt.prompt(), prompt.left @ prompt.right)


@pytest.mark.parametrize("anchor", ["vocab", "none"])
def test_count_does_not_depend_on_anchor(anchor: Any) -> None:
    assert DPT(anchor=anchor, length=100, rank=10).count(768) == 8680


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"anchor": "labels"}, "anchor is 'labels'; it must be vocab or text or label_words or none"),
        ({"anchor": "text"}, "anchor is 'text' and init_text is ''"),
        ({"init_text": "good"}, "anchor is 'vocab' and init_text is 'good'"),
        ({"init": "uniform"}, "init is 'uniform' and anchor 'vocab'.* give anchor none for a product alone"),
        ({"anchor": "none", "factor_init": "gradient"}, "factor_init is 'gradient' .* with anchor 'none'"),
        ({"factor_init": "svd"}, "factor_init is 'svd'; it must be random or gradient"),
        ({"anchor": "none", "init": "text"}, "init is 'text' and init_text is ''"),
        ({"gradient_batches": 0}, "gradient_batches is 0"),
    ],
)
def test_incompatible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    config = DPT()
    for name, value in settings.items():
        object.__setattr__(config, name, value)  # past the tests' own type checker, which users do not have
    with pytest.raises(ValueError, match=said):
        config.check()


@pytest.mark.parametrize(
    ("settings", "facts", "said"),
    [
        ({"anchor": "text", "init_text": "far too long"}, {}, "has 12 tokens and the prompt a length of 6"),
        ({"anchor": "label_words"}, {"label_words": ()}, "label words, but the task has none"),
        (
            {"anchor": "label_words"},
            {"label_words": ("yes", "perhaps")},
            "tokens and the prompt a length of 6, so its end",
        ),
        ({}, {"start": torch.zeros(5, DIM)}, r"the prompt to start from is \(5, 16\) and the new one \(6, 16\)"),
        (
            {"factor_init": "gradient"},
            {"start": torch.zeros(LENGTH + 1, DIM)},
            r"the prompt to start from is \(7, 16\)",
        ),
    ],
)
def test_hosts_without_anchor_rows_are_refused(settings: dict[str, Any], facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        built(settings, host(**facts))


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
def test_ulpt_matches_its_formula(scale: float | None) -> None:
    ours = ULPT(length=LENGTH, rank=5, scale=scale).build(host(), seeded(1))
    unit = host().rms if scale is None else scale
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    theirs = {name: value.detach().double().requires_grad_() for name, value in ours.named_parameters()}
    projection = ours.projection.double()
    rows = [(z @ projection) * theirs["gain"] + theirs["bias"] for z in theirs["latent"]]
    close(ours.prompt().double(), unit * torch.stack(rows))
    weights = torch.randn(LENGTH, DIM, generator=seeded(6))
    (ours.prompt() * weights).sum().backward()
    (unit * torch.stack(rows) * weights.double()).sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        expected = theirs[name].grad
        assert expected is not None
        close(parameter.grad.double(), expected)


def test_ulpt_starts_at_host_rms_or_as_published() -> None:
    wide = host(embedding=0.5 * torch.randn(300, 200, generator=seeded(1)))
    prompt = ULPT(length=80, rank=50).build(wide, seeded(0)).prompt()
    assert float(prompt.detach().square().mean().sqrt()) == pytest.approx(wide.rms, rel=0.05)
    published = ULPT(length=80, rank=50, scale=1.0).build(wide, seeded(0))
    bound = (6 / (50 + 200)) ** 0.5
    assert 0.99 * bound < float(published.projection.abs().max()) <= bound
    assert float(published.latent.detach().square().mean()) == pytest.approx(1, rel=0.05)
    assert ULPT.published() == ULPT(length=100, rank=64, scale=1.0)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_ulpt_fits_a_warm_start_by_least_squares(scale: float | None) -> None:
    inputs = 0.2 * torch.randn(LENGTH, DIM, generator=seeded(9))
    exact = ULPT(length=LENGTH, rank=DIM, scale=scale).build(host(start=inputs), seeded(1))
    close(exact.prompt().detach(), inputs)
    thin = ULPT(length=LENGTH, rank=4, scale=scale).build(host(start=inputs), seeded(1))
    rest = (inputs - thin.prompt().detach()).double()
    close(rest @ thin.projection.double().T, torch.zeros(LENGTH, 4, dtype=torch.float64))


def test_anchored_and_plain_prompt_start_equal() -> None:
    plain = Plain(length=LENGTH).build(host(), seeded(2)).prompt().detach()
    close(built({}).prompt().detach(), plain)
    assert dataclasses.replace(host()).rms == host().rms
