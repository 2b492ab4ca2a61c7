"""Each method's prompt and shift, with the gradients of all parameters, against its paper's formula.

The references run in float64 on the built prompt's own numbers. Ours is float32: products of up to 48 terms of
order 1 round to about 48 * 6e-8, and a layer norm divides by a spread of order 1, so 1e-4 relative leaves an order
of magnitude and still sees any wrong constant.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from softprompt.prompts import Host, PromptConfig, SoftPrompt
from softprompt.prompts.adept import ADePT
from softprompt.prompts.bpt import BPT, Mode, whitening
from softprompt.prompts.dept import DePT
from softprompt.prompts.dpt import DPT
from softprompt.prompts.plain import Plain
from softprompt.prompts.residual import Residual
from softprompt.prompts.spectral import Spectral

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
VOCAB, DIM, LENGTH = 150, 48, 12
Reference = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def host(rms: float = 0.14) -> Host:
    table = rms * torch.randn(VOCAB, DIM, generator=seeded(7))
    return Host(embedding=table, encode=lambda text: [ord(letter) for letter in text], special=frozenset({0}))


def plain(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return p["scale"] * p["matrix"], embeds


def product(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    total = sum(torch.outer(column, row) for column, row in zip(p["left"].unbind(1), p["right"].unbind(0), strict=True))
    return p["scale"] * total, embeds


def residual(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for i, x in enumerate(p["matrix"]):
        net = {name: p[name][i % len(p[name])] for name in ("down", "down_bias", "up", "up_bias", "gain", "bias")}
        out = net["up"].T @ (net["down"].T @ x + net["down_bias"][0]).clamp(min=0) + net["up_bias"][0]
        centered = out - out.sum() / DIM
        rows.append(x + centered / ((centered**2).sum() / DIM + 1e-5) ** 0.5 * net["gain"][0] + net["bias"][0])
    return p["scale"] * torch.stack(rows), embeds


def dept(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    table = p["scale"] * 8 / math.sqrt(p["left"].shape[1]) * torch.einsum("sr,rd->sd", p["left"], p["right"])
    shifted = [[e + table[i] for e, i in zip(*row, strict=True)] for row in zip(embeds, positions, strict=True)]
    return p["scale"] * p["matrix"], torch.stack([torch.stack(row) for row in shifted])


def adept(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    inner = torch.einsum("bsd,dr->bsr", embeds / p["scale"], p["down"]) + p["down_bias"]
    moved = torch.einsum("bsr,rd->bsd", torch.where(inner > 0, inner, 0), p["up"]) + p["up_bias"]
    return p["scale"] * p["matrix"], embeds + p["scale"] * moved


def spectral(p: dict[str, Tensor], embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = torch.diag((p["values"] - p["threshold"]).clamp(min=0))
    return p["scale"] * p["left"] @ diagonal @ p["right"], embeds


CASES: list[tuple[PromptConfig, Reference]] = [
    (Plain(length=LENGTH), plain),
    (DPT(anchor="none", length=LENGTH, rank=4), product),
    (Residual(length=LENGTH, width=9), residual),
    (Residual(length=LENGTH, width=9, shared=False), residual),
    (DePT(length=LENGTH, rank=5, positions=20), dept),
    (ADePT(length=LENGTH, width=6), adept),
    (BPT(length=LENGTH, rank=7), product),
    (BPT(length=LENGTH, mode="frozen", through="inputs"), product),
    (BPT(length=LENGTH, mode="tuned", through="inputs"), product),
    (Spectral(length=LENGTH), spectral),
    (Spectral(length=LENGTH, threshold=0.5), spectral),
]
# Published scale too: there the constants are 1 and cannot hide a missing one.
CASES += [(config.replace(scale=1.0), reference) for config, reference in CASES]


@pytest.mark.parametrize(("config", "reference"), CASES, ids=lambda case: getattr(case, "name", None))
def test_method_matches_its_formula(config: PromptConfig, reference: Reference) -> None:
    facts = host()
    ours = perturbed(config.build(facts, seeded(1)))
    ids = torch.randint(VOCAB, (3, 11), generator=seeded(2))
    positions = torch.stack([torch.randperm(20, generator=seeded(row))[:11] for row in range(3)])
    embeds = facts.embedding[ids]
    got = ours.prompt(), ours.shift(embeds, ids, positions)

    numbers = {name: tensor.detach().double() for name, tensor in ours.state_dict().items()}
    trained = {name: numbers[name].requires_grad_() for name, _ in ours.named_parameters()}
    expected = reference(numbers, embeds.double(), positions)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine.double(), theirs)

    weights = [torch.randn(value.shape, generator=seeded(3)) for value in got]
    sum((value * weight).sum() for value, weight in zip(got, weights, strict=True)).backward()
    sum((value * weight).sum() for value, weight in zip(expected, weights, strict=True)).backward()
    for name, parameter in ours.named_parameters():
        size = float(trained[name].grad.abs().max())
        close(parameter.grad.double() / size, trained[name].grad / size, msg=lambda text, name=name: f"{name}: {text}")


def perturbed(prompt: SoftPrompt) -> SoftPrompt:
    # B = 0 and LayerNorm's gain of 1 would hide most of a formula.
    generator = seeded(11)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * parameter.abs().mean().clamp(min=0.3) * torch.randn(parameter.shape, generator=generator)
    return prompt


@pytest.mark.parametrize("rank", [4, 10, 40])
def test_published_dpt_starts_with_spread_sqrt_rank_12th(rank: int) -> None:
    wide = Host(embedding=torch.randn(4, 2000, generator=seeded(0)), encode=lambda text: [])
    prompt = DPT.published().replace(rank=rank, length=400).build(wide, seeded(rank)).prompt()
    # 400 + 2000 rows of independent draws each: the spread itself is known to about 2 %.
    assert float(prompt.detach().std()) == pytest.approx(math.sqrt(rank) / 12, rel=0.08)


@pytest.mark.parametrize(
    ("config", "dim", "count"),
    [
        (DPT.published(), 512, 6_120),
        (DPT.published(), 768, 8_680),
        (DPT.published(), 1024, 11_240),
        (Plain.published(), 768, 76_800),
        (Residual.published(), 512, 462_736),
        (Residual.published(), 768, 693_904),
        (Residual.published(), 1024, 925_072),
        (DePT.published(), 768, 76_800),
        (DePT.published().replace(length=40, rank=45), 768, 76_800),
        (DePT.published().replace(positions=348), 768, 79_560),
        (ADePT.published(), 768, 76_051),
        (BPT.published(), 768, 65_100),
        (BPT.published().replace(rank=25), 768, 21_700),
        (BPT.published().replace(mode="frozen"), 768, 76_800),
        (BPT.published().replace(mode="tuned"), 768, 666_624),
    ],
)
def test_published_counts(config: PromptConfig, dim: int, count: int) -> None:
    assert config.count(dim) == count


def test_published_bpt_starts_small_and_xavier() -> None:
    prompt = BPT.published().build(Host(embedding=torch.randn(4, 768), encode=lambda text: []), seeded(0))
    assert float(prompt.left.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(prompt.right.detach().abs().max()) == pytest.approx(math.sqrt(6 / (75 + 768)), rel=0.01)


@pytest.mark.parametrize("mode", ["frozen", "tuned"])
def test_warm_whitened_prompt_keeps_units(mode: Mode) -> None:
    """The same second factor and scale, so that one learning rate moves both alike; and the prompt it starts from."""
    config = BPT(length=LENGTH, mode=mode, through="inputs")
    start = 0.3 * torch.randn(LENGTH, DIM, generator=seeded(4))
    cold = config.build(host(), seeded(0))
    warm = config.build(dataclasses.replace(host(), start=start), seeded(0))
    close(warm.prompt(), start)
    assert torch.equal(warm.right, cold.right)
    assert torch.equal(warm.scale, cold.scale)


def test_offsets_and_shifts_start_at_zero() -> None:
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    embeds = host().embedding[ids]
    for config in (DePT(), ADePT()):
        assert torch.equal(config.build(host(), seeded(0)).shift(embeds, ids, positions), embeds)


@pytest.mark.parametrize("samples", [10, 5000])
def test_whitening_gives_identity_moment(samples: int) -> None:
    mixing = torch.randn(DIM, DIM, generator=seeded(1)) / DIM**0.5
    rows = torch.randn(samples, DIM, generator=seeded(2)) @ mixing
    matrix = whitening(rows, 1e-3).double()
    moment = rows.double().T @ rows.double() / samples
    full = moment + 1e-3 * moment.trace() / DIM * torch.eye(DIM, dtype=torch.float64)
    # The matrix is rounded to float32; condition numbers up to 1e4 (10 rows for 48 directions) act on that.
    torch.testing.assert_close(matrix @ full @ matrix.T, torch.eye(DIM, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rms", [0.02, 10.0])
@pytest.mark.parametrize("config", [case for case, _ in CASES if case.scale is None], ids=lambda case: case.name)
def test_unit_scale_start_follows_host_rms(config: PromptConfig, rms: float) -> None:
    prompt = config.build(host(rms), seeded(0)).prompt().detach()
    small = config.build(host(1.0), seeded(0)).prompt().detach()
    torch.testing.assert_close(prompt / rms, small, rtol=1e-3, atol=1e-4)
    assert 0.3 < float(small.square().mean().sqrt()) < 2


@pytest.mark.parametrize("config", [Spectral(length=LENGTH), Spectral(length=LENGTH, threshold=0.7, scale=1.0)])
def test_spectral_starts_as_rows_and_counts_rank(config: Spectral) -> None:
    prompt = config.build(host(), seeded(3))
    start = Plain(length=LENGTH).build(host(), seeded(3)).prompt()
    torch.testing.assert_close(prompt.prompt(), start, rtol=1e-4, atol=1e-5)
    assert prompt.rank() == LENGTH
    with torch.no_grad():
        prompt.values[[2, 5, 6]] = prompt.threshold - torch.tensor([0.0, 0.1, 3.0])
    assert prompt.rank() == LENGTH - 3 == int(torch.linalg.matrix_rank(prompt.prompt()))
    warm = dataclasses.replace(host(), start=prompt.prompt().detach())  # as --init-prompt does
    continued = DPT(anchor="none", length=LENGTH, rank=LENGTH - 3).build(warm, seeded(9))
    torch.testing.assert_close(continued.prompt(), prompt.prompt(), rtol=1e-4, atol=1e-5)


def test_spectral_values_switched_off_stay_off() -> None:
    prompt = Spectral(length=LENGTH).build(host(), seeded(3))
    with torch.no_grad():
        prompt.values[4] = -0.01
    training_step = torch.optim.AdamW(prompt.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(5):
        training_step.zero_grad()
        (prompt.prompt() - host().embedding[:LENGTH]).square().sum().backward()
        training_step.step()
    assert prompt.values[4].item() == pytest.approx(-0.01)
    assert prompt.rank() <= LENGTH - 1


def test_spectral_weight_decay_crosses_a_threshold() -> None:
    prompt = Spectral(length=LENGTH, threshold=1.0).build(host(), seeded(3))
    training_step = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(30):
        training_step.zero_grad()
        (0 * prompt.prompt()).sum().backward()
        training_step.step()
    assert prompt.rank() == 0


def test_spectral_of_repeated_rows_has_their_rank() -> None:
    assert Spectral(length=LENGTH, init="text", init_text="aab").build(host(), seeded(0)).rank() == 2


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (DePT, {"beyond": "clip"}, "beyond is 'clip'"),
        (DePT, {"positions": 0}, "positions is 0"),
        (DePT, {"alpha": 0.0}, "alpha is 0.0"),
        (DePT, {"offset_rate": 0.0}, "offset_rate is 0.0"),
        (ADePT, {"dropout": 1.0}, "dropout is 1.0"),
        (ADePT, {"network_rate": math.nan}, "network_rate is nan"),
        (BPT, {"mode": "whitened"}, "mode is 'whitened'"),
        (BPT, {"eps": 0.0}, "eps is 0.0"),
        (Residual, {"width": 0}, "width is 0"),
        (Residual, {"scale": -1.0}, "scale is -1.0"),
        (Spectral, {"threshold": -0.1}, "threshold is -0.1"),
        (Spectral, {"init": "text"}, "init_text is ''"),
    ],
)
def test_invalid_settings_are_refused(method: type[PromptConfig], settings: dict, said: str) -> None:
    config = method()
    for name, value in settings.items():
        object.__setattr__(config, name, value)  # past the tests' own type checker, which users do not have
    with pytest.raises(ValueError, match=said):
        config.check()


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (BPT, {"mode": "frozen", "rank": 2}, "rank is 2 and has no effect with mode 'frozen', .* leave rank out"),
        (BPT, {"mode": "tuned", "init": "whitening"}, "init is 'whitening' .* with mode 'tuned'"),
        (BPT, {"mode": "frozen", "gradient_batches": 3}, "gradient_batches is 3 .* with mode 'frozen'"),
        (BPT, {"through": "inputs"}, "through is 'inputs' .* with mode 'bilinear' and init 'uniform'"),
        (BPT, {"samples": 100}, "samples is 100 .* with mode 'bilinear' and init 'uniform'"),
        (BPT, {"init": "gradient", "eps": 0.1}, "eps is 0.1 .* with mode 'bilinear' and init 'gradient'"),
        (BPT, {"init": "whitening", "gradient_batches": 50}, "gradient_batches is 50 .* with init 'whitening'"),
        (DPT, {"gradient_batches": 50}, "gradient_batches is 50 and has no effect with factor_init 'random'"),
        (DPT, {"anchor": "none", "gradient_batches": 50}, "gradient_batches is 50 .* with anchor 'none'"),
    ],
)
def test_settings_without_effect_are_refused(method: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        method(**settings)


@pytest.mark.parametrize(
    "config",
    [
        BPT(rank=2),
        BPT(rank=2, init="whitening", through="inputs", samples=100, eps=0.1),
        BPT(mode="frozen", through="inputs", samples=100, eps=0.1),
        BPT(length=4, rank=2, init="gradient", gradient_batches=3),
        DPT(factor_init="gradient", gradient_batches=3),
    ],
)
def test_settings_with_effect_are_accepted(config: PromptConfig) -> None:
    changed = {name: value for name, value in config.to_json().items() if value != type(config)().to_json()[name]}
    assert PromptConfig.from_json({"method": config.name, **changed}) == config


def test_bpt_of_any_rank_above_the_length_starts_at_the_warm_start() -> None:
    start = 0.3 * torch.randn(LENGTH, DIM, generator=seeded(4))
    for rank in (LENGTH, LENGTH + 1, 3 * LENGTH):
        prompt = BPT(length=LENGTH, rank=rank).build(dataclasses.replace(host(), start=start), seeded(0))
        torch.testing.assert_close(prompt.prompt(), start, rtol=1e-5, atol=1e-6)
        prompt.prompt().square().sum().backward()
        assert prompt.right.grad is not None
        assert bool((prompt.right.grad.norm(dim=1) > 0).all())  # no direction is stuck at zero


@pytest.mark.parametrize(
    "config",
    [
        BPT(length=LENGTH, rank=3, init="gradient"),
        BPT(length=LENGTH, rank=3, init="whitening"),
        Plain(length=LENGTH, init="label_words"),
        Plain(length=LENGTH, init="text", init_text="a film review"),
        Residual(length=LENGTH, init="label_words"),
        DPT(length=LENGTH, rank=3, anchor="label_words"),
        DPT(length=LENGTH, rank=3, anchor="none", init="label_words"),
    ],
)
def test_initial_values_beside_a_warm_start_are_refused(config: PromptConfig) -> None:
    with pytest.raises(ValueError, match="start from another prompt"):
        config.build(dataclasses.replace(host(), start=torch.ones(LENGTH, DIM)), seeded(0))


def test_whitening_zero_vectors_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be whitened"):
        whitening(torch.zeros(5, 3), 1e-3)


def test_adept_dropout_is_active_in_training_only() -> None:
    facts = host()
    prompt = perturbed(ADePT(dropout=0.5).build(facts, seeded(0)))
    ids, positions = torch.arange(1, 21)[None], torch.arange(20)[None]
    train, reloaded = (prompt.train().shift(facts.embedding[ids], ids, positions) for _ in range(2))
    assert not torch.allclose(train, reloaded)
    folded = prompt.fold()
    assert prompt.training
    quiet = prompt.eval().shift(facts.embedding[ids], ids, positions)
    close(folded.shift(facts.embedding[ids], ids, positions), quiet)


@pytest.mark.parametrize("scale", [None, 1.0, 0.03])
def test_dpt_starts_as_best_product_at_any_scale(scale: float | None) -> None:
    prompt = DPT(anchor="none", length=LENGTH, rank=4, scale=scale).build(host(), seeded(3))
    left, values, right = torch.linalg.svd(Plain(length=LENGTH).build(host(), seeded(3)).prompt().detach().double())
    close(prompt.prompt().double(), left[:, :4] @ torch.diag(values[:4]) @ right[:4])
    if scale is None:
        sizes = [float(factor.detach().square().mean()) for factor in (prompt.left, prompt.right)]
        assert sizes == pytest.approx([1, 1], rel=1e-5)
