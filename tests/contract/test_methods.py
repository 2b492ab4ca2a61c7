"""What every prompt method must keep; the cases come from METHODS, so a new file in prompts/ is tested as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt.prompts import METHODS, Host, PromptConfig, SoftPrompt
from softprompt.prompts.dpt import AnchoredPrompt
from softprompt.prompts.ulpt import ProjectedPrompt

VOCAB, DIM = 211, 96

# Settings beyond the defaults that change what a method builds.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"length": 7, "init": "label_words"}),
    ("dpt", {"anchor": "none"}),
    ("dpt", {"anchor": "none", "length": 7, "rank": 7, "init": "text", "init_text": "a text"}),
    ("dpt", {"anchor": "none", "init": "uniform"}),
    ("dpt", {"anchor": "text", "length": 7, "rank": 7, "init_text": "a text"}),
    ("dpt", {"anchor": "label_words", "rank": 1, "scale": 1.0}),
    ("dpt", {"factor_init": "gradient"}),
    ("dpt", {"factor_init": "gradient", "anchor": "label_words", "length": 9, "rank": 7}),
    ("residual", {"length": 7, "width": 5, "shared": False}),
    ("dept", {"positions": 30, "beyond": "none"}),
    ("adept", {"length": 3, "width": 1, "dropout": 0.2}),
    ("bpt", {"mode": "frozen"}),
    ("bpt", {"mode": "tuned", "samples": 20}),
    ("bpt", {"mode": "tuned", "through": "inputs"}),
    ("bpt", {"init": "whitening", "rank": 90}),
    ("bpt", {"init": "gradient"}),
    ("bpt", {"init": "gradient", "rank": 7, "length": 7, "scale": 1.0}),
    ("ulpt", {"length": 7, "rank": 96}),
    ("spectral", {"length": 120, "threshold": 0.5}),
]
DEFAULTS = {method: config() for method, config in METHODS.items()}
PUBLISHED = {f"{method}-published": config.published() for method, config in METHODS.items()}
VARIANTS = {f"{method}-{settings}": METHODS[method](**settings) for method, settings in SETTINGS}

defaults = pytest.mark.parametrize("config", DEFAULTS.values(), ids=DEFAULTS.keys())
cases = pytest.mark.parametrize(
    "config", [*DEFAULTS.values(), *PUBLISHED.values(), *VARIANTS.values()], ids=[*DEFAULTS, *PUBLISHED, *VARIANTS]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def host() -> Host:
    return Host(
        embedding=0.14 * torch.randn(VOCAB, DIM, generator=seeded(5)),
        encode=lambda text: [ord(letter) for letter in text],
        label_words=("yes", "no"),
        special=frozenset({0, 1}),
        query_key=lambda: torch.randn(DIM, DIM, generator=seeded(6)),
        gradient=lambda rows, batches: rows.flip(0) / batches,
    )


def perturbed(prompt: SoftPrompt, seed: int = 3) -> SoftPrompt:
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return prompt


def batch(host: Host) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (4, 25), generator=seeded(8))
    positions = (torch.arange(25) - torch.tensor([0, 3, 11, 24])[:, None]).clamp(min=0)
    return host.embedding[ids], ids, positions


def rank_of(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-5))


@cases
def test_prompt_shape_and_dtype(config: PromptConfig, host: Host) -> None:
    prompt = config.build(host, seeded(0))
    embeds, ids, positions = batch(host)
    assert prompt.prompt().shape == (config.length, DIM)
    assert prompt.prompt().dtype == torch.float32
    assert prompt.shift(embeds, ids, positions).shape == embeds.shape
    assert prompt.shift(embeds.bfloat16(), ids, positions).dtype == torch.bfloat16
    for name, tensor in prompt.state_dict().items():
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point(), name
        assert torch.isfinite(tensor).all(), name


@cases
def test_equal_generators_give_equal_prompts(config: PromptConfig, host: Host) -> None:
    torch.manual_seed(1)
    first = config.build(host, seeded(0)).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    reloaded = config.build(host, seeded(0)).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "building drew from torch's global generator"
    assert first.keys() == reloaded.keys()
    assert all(torch.equal(first[name], reloaded[name]) for name in first)


@defaults
def test_another_seed_gives_another_prompt(config: PromptConfig, host: Host) -> None:
    one, other = (config.build(host, seeded(seed)).prompt() for seed in (0, 1))
    assert not torch.allclose(one, other)


@cases
def test_count_is_number_of_trainable_parameters(config: PromptConfig, host: Host) -> None:
    prompt = config.build(host, seeded(0))
    assert config.count(DIM) == sum(parameter.numel() for parameter in prompt.parameters())
    assert all(parameter.requires_grad for parameter in prompt.parameters())


@pytest.mark.parametrize("config", [c for c in DEFAULTS.values() if hasattr(c, "rank")], ids=lambda config: config.name)
def test_rank_setting_bounds_rank_of_prompt(config: PromptConfig, host: Host) -> None:
    low = config.replace(rank=3)
    prompt = low.build(host, seeded(0))
    fixed = prompt.prompt().detach()
    if isinstance(prompt, AnchoredPrompt):
        fixed = fixed - prompt.scale * prompt.first_left @ prompt.first_right  # P0 - s A0 B0
    folded = perturbed(prompt, seed=4).fold()
    tables = [folded.prompt(), folded.position_table, folded.input_table]
    if isinstance(prompt, AnchoredPrompt):
        tables.append(folded.prompt() - fixed)
    # The gain and the shift of ULPT are of full rank, and of rank 1; what it projects is not.
    bound = 4 if isinstance(prompt, ProjectedPrompt) else 3
    assert min(rank_of(table) for table in tables if table is not None) == bound


@cases
def test_groups_partition_parameters_and_have_rates(config: PromptConfig, host: Host) -> None:
    prompt = config.build(host, seeded(0))
    grouped = [id(parameter) for group in prompt.groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in prompt.parameters())
    assert config.rates().keys() == prompt.groups().keys()
    assert config.rates()["prompt"] == 1


@cases
@pytest.mark.parametrize("trained", [False, True])
def test_live_equals_folded(config: PromptConfig, host: Host, trained: bool) -> None:
    prompt = config.build(host, seeded(0)).eval()
    if trained:
        perturbed(prompt)
    folded = prompt.fold()
    embeds, ids, positions = batch(host)
    assert torch.equal(folded.prompt(), prompt.prompt())
    live = prompt.shift(embeds, ids, positions).detach()
    # Tables are the live numbers from another batch shape: sums of DIM products of order `live` in another order.
    torch.testing.assert_close(
        folded.shift(embeds, ids, positions), live, rtol=1e-5, atol=1e-5 * float(live.abs().max())
    )
    assert not list(folded.parameters())
    made = ["prompt"] + ["position table"] * (folded.position_table is not None)
    assert " + ".join(made + ["input table"] * (folded.input_table is not None)) == config.folds


@cases
def test_fold_is_independent_of_further_training(config: PromptConfig, host: Host) -> None:
    prompt = config.build(host, seeded(0)).eval()
    folded = prompt.fold()
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    perturbed(prompt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())
    assert not torch.equal(prompt.prompt(), folded.prompt())


@cases
def test_shift_does_not_depend_on_padding_or_row_order(config: PromptConfig, host: Host) -> None:
    prompt = perturbed(config.build(host, seeded(0))).eval()
    embeds, ids, positions = batch(host)
    full = prompt.shift(embeds, ids, positions)
    single_row = prompt.shift(embeds[2:3, 11:], ids[2:3, 11:], positions[2:3, 11:])
    torch.testing.assert_close(full[2:3, 11:], single_row, rtol=1e-5, atol=1e-5)
    flipped = prompt.shift(embeds.flip(0), ids.flip(0), positions.flip(0)).flip(0)
    torch.testing.assert_close(flipped, full, rtol=1e-5, atol=1e-5)


@cases
def test_every_parameter_gets_a_gradient(config: PromptConfig, host: Host) -> None:
    prompt = perturbed(config.build(host, seeded(0)))
    prompt_values, shifted = prompt.prompt(), prompt.shift(*batch(host))
    weigh = seeded(6)
    total = (prompt_values * torch.randn(prompt_values.shape, generator=weigh)).sum()
    (total + (shifted * torch.randn(shifted.shape, generator=weigh)).sum()).backward()
    for name, parameter in prompt.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@cases
def test_one_step_at_default_rates_lowers_loss(config: PromptConfig, host: Host) -> None:
    prompt = config.build(host, seeded(0)).eval()
    target = host.embedding[torch.randint(VOCAB, (config.length,), generator=seeded(9))]

    def loss() -> torch.Tensor:
        return (prompt.prompt() - target).square().mean() + (prompt.shift(*batch(host)) - 0.1).square().mean()

    rates = config.rates()
    groups = [{"params": group, "lr": 1e-3 * rates[name]} for name, group in prompt.groups().items()]
    training_step, before = torch.optim.Adam(groups), loss()
    before.backward()
    training_step.step()
    assert loss() < before


@cases
def test_settings_round_trip_json(config: PromptConfig) -> None:
    reloaded = PromptConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert reloaded == config
    assert type(reloaded) is METHODS[config.name]


@cases
def test_parameters_round_trip_file(config: PromptConfig, host: Host, tmp_path: Path) -> None:
    prompt = perturbed(config.build(host, seeded(0))).eval()
    save_file(prompt.state_dict(), tmp_path / "prompt.safetensors")
    reloaded = config.build(host, seeded(1)).eval()
    reloaded.load_state_dict(load_file(tmp_path / "prompt.safetensors"))
    assert torch.equal(reloaded.prompt(), prompt.prompt())
    assert torch.equal(reloaded.shift(*batch(host)), prompt.shift(*batch(host)))


@defaults
def test_invalid_length_and_unknown_settings_are_refused(config: PromptConfig) -> None:
    with pytest.raises(ValueError, match="length is 0; it must be at least 1"):
        config.replace(length=0)
    with pytest.raises(ValueError, match=f"{config.name} has no setting color"):
        PromptConfig.from_json(config.to_json() | {"color": "red"})
