"""Ranks and cuts, each against numpy, scipy or a few lines of its own definition."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from softprompt import (
    DPT,
    Backbone,
    Experiment,
    Folded,
    Plain,
    Run,
    Score,
    TrainingConfig,
    evaluate,
    load_backbone,
    train,
)
from softprompt.analysis.rank import (
    Drop,
    FunctionalRank,
    LoadedPrompt,
    Spectrum,
    TruncatedScore,
    Truncation,
    functional_rank,
    load_prompts,
    measure,
    ranks_up_to,
    spectra,
    suggest_rank,
    truncated_svd,
)
from softprompt.prompts.dept import DePT
from softprompt.runs import build_prompted_model
from softprompt.tasks.user import load_task

MakeBackbone = Callable[[str], Backbone]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def product(length: int, rank: int, dim: int, seed: int = 0) -> torch.Tensor:
    """A matrix of that rank, in float32 as prompts are kept."""
    draw = seeded(seed)
    return torch.randn(length, rank, generator=draw) @ torch.randn(rank, dim, generator=draw)


# Spectrum


@pytest.mark.parametrize(("length", "rank", "dim"), [(20, 3, 48), (48, 7, 20), (100, 10, 768), (1, 1, 8), (12, 12, 12)])
def test_spectrum_ranks_equal_numpy_and_formulas(length: int, rank: int, dim: int) -> None:
    matrix = product(length, rank, dim)
    found = Spectrum.of(matrix)
    assert found.numerical == rank == np.linalg.matrix_rank(matrix.numpy())
    values = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(found.values, values, rtol=1e-9, atol=1e-9 * values[0])  # two float64 routines
    frobenius, spectral = np.linalg.norm(matrix.double(), "fro"), np.linalg.norm(matrix.double(), 2)
    assert found.stable == pytest.approx(frobenius**2 / spectral**2, rel=1e-9)
    shares = values[values > 0] / values.sum()
    assert found.effective == pytest.approx(np.exp(stats.entropy(shares)), rel=1e-9)
    assert 1 <= found.stable <= found.effective * (1 + 1e-9) <= min(length, dim) * (1 + 1e-9)


@pytest.mark.parametrize(("value", "rank"), [(3e-6, 2), (1e-5, 3)])
def test_numerical_rank_tolerance_equals_numpys(value: float, rank: int) -> None:
    """48 * 2^-23 is 5.7e-6."""
    matrix = torch.zeros(20, 48)
    matrix[range(3), range(3)] = torch.tensor([1.0, 0.5, value])
    assert Spectrum.of(matrix).numerical == np.linalg.matrix_rank(matrix.numpy()) == rank


def test_spectrum_of_known_matrices() -> None:
    equal = Spectrum.of(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0])))
    assert (equal.numerical, equal.stable) == (3, 3)
    assert equal.effective == pytest.approx(3)
    one = Spectrum.of(torch.ones(5, 7))
    assert (one.numerical, one.stable, one.effective) == (1, pytest.approx(1), pytest.approx(1, abs=1e-6))
    nothing = Spectrum.of(torch.zeros(4, 6))
    assert (nothing.numerical, nothing.stable, nothing.effective) == (0, 0, 0)


def test_update_rank_ignores_rounding_of_the_start() -> None:
    start, change = 50 + torch.randn(30, 64, generator=seeded(1)), 1e-3 * product(30, 2, 64)
    matrix = start + change  # in float32, so that 1e-3 of 50 keeps but a few digits
    assert np.linalg.matrix_rank((matrix - start).numpy()) > 2
    found = spectra(matrix, start)
    assert found["update"].numerical == 2
    assert found["prompt"].numerical == 30
    assert found["centered"].numerical == 29


@pytest.mark.parametrize("rank", [0, 1, 4, 9])
def test_truncated_svd_is_the_nearest_matrix(rank: int) -> None:
    matrix = torch.randn(9, 14, generator=seeded(2))
    truncated = truncated_svd(matrix, rank)
    assert np.linalg.matrix_rank(truncated.numpy()) == rank
    omitted = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    # Eckart and Young: the distance is the norm of the omitted singular values.
    assert float((matrix - truncated).norm()) == pytest.approx(float(np.sqrt((omitted**2).sum())), abs=1e-5)


@pytest.mark.parametrize("rank", [-1, 10])
def test_truncated_svd_refuses_impossible_rank(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank is {rank}; .* can be truncated to rank 0 to 9"):
        truncated_svd(torch.zeros(9, 14), rank)


@pytest.mark.parametrize("most", range(1, 130))
def test_ranks_up_to_rise_to_the_largest(most: int) -> None:
    found = ranks_up_to(most)
    assert found == sorted(set(found))
    assert found[: min(most, 8)] == list(range(1, min(most, 8) + 1))
    assert found[-1] == most
    assert all(later <= 1.51 * former for former, later in pairwise(found[1:]))


# FunctionalRank rank


def score(value: float, low: float, majority: float = 0.5) -> Score:
    return Score(
        metric="accuracy",
        value=value,
        n=200,
        majority=majority,
        majority_answer="a",
        majority_source="train",
        ci_low=low,
        ci_high=1.0,
    )


def functional(cuts_by_rank: dict[int, tuple[float, float]], low: float = 0.7, majority: float = 0.5) -> FunctionalRank:
    """A functional rank from score and p-value by rank."""
    cuts = [
        TruncatedScore(
            rank=rank, score=score(value, 0.0), drop=Drop(value=0.8 - value, ci_low=0.0, ci_high=0.1, p_value=p_value)
        )
        for rank, (value, p_value) in cuts_by_rank.items()
    ]
    full = score(0.8, low, majority)
    return FunctionalRank(task="t", backbone="b", part="prompt", split="dev", full=full, truncations=tuple(cuts))


def test_smallest_rank_by_interval_and_significance() -> None:
    lucky = functional({1: (0.4, 0.001), 2: (0.75, 0.3), 3: (0.6, 0.001), 4: (0.72, 0.02), 5: (0.8, 1.0)})
    assert (lucky.rank_by_interval, lucky.rank_by_significance) == (2, 5)
    assert functional({1: (0.9, 1.0), 2: (0.8, 1.0)}).rank_by_significance == 1
    never = functional({1: (0.1, 0.001), 2: (0.2, 0.001)})
    assert (never.rank_by_interval, never.rank_by_significance) == (None, None)


def loaded(name: str, length: int = 20) -> LoadedPrompt:
    return LoadedPrompt(name=name, folder=Path(name), prompt=Folded(torch.zeros(length, 32)))


def test_suggestion_is_the_largest_over_seeds() -> None:
    two, four = ({rank: (0.8, 1.0 if rank >= least else 0.0) for rank in range(1, 9)} for least in (2, 4))
    weak = functional(two, low=0.45)
    found = suggest_rank(
        [
            (loaded("a"), functional(two)),
            (loaded("b"), functional(four)),
            (loaded("c"), weak),
            (loaded("short", 5), weak),
        ]
    )
    assert [one.rank for one in found] == [4, None]
    assert found[0].evidence == {"a": 2, "b": 4, "c": None}
    assert found[0].sentence.startswith("Try --anchor none --rank 4: the largest, over 2 of 3 prompts")
    assert "a loss of up to 0.100 is not ruled out" in found[0].sentence
    assert "2 prompts are little evidence" in found[0].sentence
    assert "No larger rank was tried" not in found[0].sentence
    assert found[1].sentence.startswith("No rank can be suggested: none of 1 prompts beats the majority answer")


def test_suggestion_at_the_largest_tried_rank_says_so() -> None:
    [found] = suggest_rank([(loaded("a"), functional({1: (0.4, 0.0), 2: (0.8, 1.0)}))])
    assert found.rank == 2
    assert "No larger rank was tried" in found.sentence


def test_suggestion_from_updates_is_for_an_anchored_dpt() -> None:
    cuts = functional({1: (0.4, 0.0), 2: (0.8, 1.0), 3: (0.8, 1.0)})
    update = dataclasses.replace(functional({0: (0.8, 1.0), 1: (0.8, 1.0)}), part="update")
    of_prompt, of_update = suggest_rank([(loaded("a"), cuts), (loaded("a"), update)])
    assert (of_prompt.part, of_prompt.rank, of_update.part, of_update.rank) == ("prompt", 2, "update", 1)
    assert of_prompt.sentence.startswith("Try --anchor none --rank 2: ")
    assert of_update.sentence.startswith("Try --rank 1: ")


def test_suggestion_none_if_one_prompt_needs_more() -> None:
    two = functional({1: (0.4, 0.0), 2: (0.8, 1.0)})
    more = functional({1: (0.4, 0.0), 2: (0.6, 0.001)})
    [found] = suggest_rank([(loaded("a"), two), (loaded("b"), more)])
    assert found.rank is None
    assert found.evidence == {"a": 2, "b": None}
    assert found.sentence == (
        "No rank can be suggested: b still loses at rank 2, the largest that was tried; try larger ones."
    )


def test_suggestion_leaves_out_prompts_that_are_ignored() -> None:
    good = functional({1: (0.8, 1.0), 2: (0.8, 1.0)})
    lossy = Drop(value=0.0, ci_low=-0.1, ci_high=0.45, p_value=1.0)
    weak = functional({1: (0.8, 1.0), 2: (0.8, 1.0), 3: (0.8, 1.0)}, low=0.3)
    weak = dataclasses.replace(weak, full=dataclasses.replace(weak.full, n=7))
    weak = dataclasses.replace(
        weak, truncations=tuple(dataclasses.replace(cut, drop=lossy) for cut in weak.truncations)
    )
    [one], [both] = suggest_rank([(loaded("a"), good)]), suggest_rank([(loaded("a"), good), (loaded("b"), weak)])
    assert both.sentence == one.sentence.replace("1 of 1", "1 of 2")


def test_suggestion_is_at_most_the_rank_that_a_dpt_was_trained_with() -> None:
    """Its update has up to twice that rank, and the rank itself suffices for it."""
    run = Run(Path("a"), Experiment(prompt=DPT(rank=2)), load_task("sentiment"), {})
    cuts = {rank: (0.8, 1.0 if rank >= 4 else 0.0) for rank in range(5)}
    update = dataclasses.replace(functional(cuts), part="update")
    [found] = suggest_rank([(dataclasses.replace(loaded("a"), run=run), update)])
    assert (found.rank, found.evidence) == (2, {"a": 4})
    assert found.sentence.startswith("Try --rank 2: ")
    assert "Truncations of the update needed more, but the rank that a DPT was trained with suffices" in found.sentence
    [of_prompt] = suggest_rank([(dataclasses.replace(loaded("a"), run=run), functional(cuts))])
    assert of_prompt.rank == 4  # of the whole prompt, for a DPT without an anchor
    [of_plain] = suggest_rank([(loaded("a"), update)])
    assert of_plain.rank == 4
    assert "trained with" not in of_plain.sentence


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


@pytest.fixture(scope="module")
def trained(llama_folder: Path, ticket_task: Path, backbone: Backbone, tmp_path_factory: Any) -> Callable[[Any], Run]:
    """A run of a method."""
    out = tmp_path_factory.mktemp("runs")

    def make(prompt: Any) -> Run:
        training = TrainingConfig(steps=40, batch_size=16, eval_steps=20, lr=0.3)
        experiment = Experiment(
            backbone=str(llama_folder), task=str(ticket_task), prompt=prompt, training=training, dtype="float32"
        )
        return train(experiment, out=out, backbone=backbone)

    return make


@pytest.fixture(scope="module")
def low_rank(trained: Callable[[Any], Run]) -> Run:
    return trained(DPT(anchor="none", length=8, rank=3))


def test_cut_at_or_above_the_rank_changes_nothing(low_rank: Run) -> None:
    [measured] = measure(low_rank.folder, functional=Truncation(ranks=(1, 2, 3, 5, 8), split="train", rows=0))
    assert measured.spectra["prompt"].numerical == 3
    found = measured.functional
    assert found is not None
    expected = evaluate(low_rank, split="train")
    assert found.full == expected
    assert [cut.rank for cut in found.truncations] == [1, 2, 3, 5, 8]
    for cut in found.truncations[2:]:
        assert cut.score == found.full
        assert cut.drop == Drop(value=0.0, ci_low=0.0, ci_high=0.0, p_value=1.0)
    assert any(cut.score != found.full for cut in found.truncations[:2]), "a cut below the rank changed nothing"
    assert found.rank_by_significance is not None
    assert found.rank_by_significance <= 3


def test_default_ranks_end_at_the_numerical_rank(low_rank: Run) -> None:
    [measured] = measure(low_rank.folder, functional=Truncation(rows=10))
    assert measured.functional is not None
    assert [cut.rank for cut in measured.functional.truncations] == [1, 2, 3]
    assert measured.functional.full.n == 10


def test_update_cut_to_rank_0_is_the_initial_prompt(low_rank: Run, backbone: Backbone) -> None:
    [one] = load_prompts(low_rank.folder)
    found = functional_rank(one, Truncation(part="update", split="train", rows=0))
    assert [cut.rank for cut in found.truncations] == list(range(7))  # A B - A_0 B_0 has at most twice the rank
    assert found.truncations[-1].score == found.full
    assert found.truncations[-1].drop.p_value == 1
    assert found.truncations[0].score != found.full
    assert one.start is not None
    first = build_prompted_model(low_rank.experiment, low_rank.task, backbone, initialize=False).prompt
    assert first is not None
    assert torch.equal(one.start, first.prompt())
    untrained = dataclasses.replace(one, prompt=Folded(one.start))
    assert functional_rank(untrained, Truncation(ranks=(8,), split="train", rows=0)).full == found.truncations[0].score


def test_update_of_anchored_dpt_is_its_factors_product(trained: Callable[[Any], Run]) -> None:
    """Seen failing with a cut that was not added to the anchor."""
    run = trained(DPT(length=8, rank=3))
    tensors = load_file(run.folder / "softprompt.safetensors")
    first_left, first_right = tensors["first_left"].double(), tensors["first_right"].double()
    product = (first_left + tensors["left_update"]) @ (first_right + tensors["right_update"])
    update = (tensors["scale"] * (product - first_left @ first_right)).numpy()
    [loaded] = load_prompts(run.folder)
    [measured] = measure(run.folder)
    assert measured.spectra["update"].numerical == 6
    expected = np.linalg.svd(update, compute_uv=False)
    # Both matrices are float32 sums, so the values below the sixth are their rounding.
    np.testing.assert_allclose(measured.spectra["update"].values, expected, atol=1e-5 * expected[0])
    cuts = functional_rank(loaded, Truncation(part="update", ranks=(0, 1, 2), split="train", rows=0)).truncations
    left, values, right = np.linalg.svd(update, full_matrices=False)
    for cut in cuts:
        rank = cut.rank
        truncated = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).float()
        prompt = dataclasses.replace(loaded, prompt=Folded(tensors["anchor"] + truncated))
        assert cut.score == functional_rank(prompt, Truncation(ranks=(8,), split="train", rows=0)).full
    assert len({cut.score.value for cut in cuts}) > 1, "every cut scores the same"


def test_start_is_rebuilt_in_the_runs_dtype(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the update would have the rounding of every embedding in it, and so full rank."""
    training = TrainingConfig(steps=3, batch_size=4, eval_steps=3)
    prompt = DPT(length=8, rank=1)
    asked = Experiment(backbone=str(llama_folder), task=str(ticket_task), prompt=prompt, training=training)
    monkeypatch.setattr("softprompt.backbones.precision.measured_dtype", lambda device: torch.float32)
    run = train(asked, out=tmp_path)
    assert run.record["backbone"]["dtype"] == "float32"
    monkeypatch.setattr("softprompt.backbones.precision.measured_dtype", lambda device: torch.bfloat16)
    [measured] = measure(run.folder)
    assert 1 <= measured.spectra["update"].numerical <= 2


def test_history_goes_from_start_to_finished(low_rank: Run, backbone: Backbone) -> None:
    [one] = load_prompts(low_rank.folder, checkpoints=True)
    assert list(one.history) == [0, 20, 40]
    best = one.history[int((low_rank.results or {})["best_step"])]
    assert torch.equal(best, low_rank.prompt(backbone).prompt())
    [measured] = measure(low_rank.folder, checkpoints=True)
    assert measured.history[0]["update"].numerical == 0
    assert measured.history[20]["update"].numerical == 6
    assert all(at["prompt"].numerical == 3 for at in measured.history.values())


def test_cut_keeps_the_input_shift(trained: Callable[[Any], Run]) -> None:
    run = trained(DePT(length=6, rank=2, positions=40))
    [one] = load_prompts(run.folder)
    assert "only the matrix is measured" in one.note
    found = functional_rank(one, Truncation(ranks=(6,), split="train", rows=0))
    assert found.truncations[0].score == found.full
    assert found.full == evaluate(run, split="train")
    assert found.truncations[0].drop.p_value == 1


def test_plain_prompt_has_full_rank_before_training(trained: Callable[[Any], Run]) -> None:
    [measured] = measure(trained(Plain(length=8)).folder, checkpoints=True)
    assert measured.history[0]["prompt"].numerical == 8
    assert measured.spectra["prompt"].numerical == 8


def test_deep_prompt_has_a_spectrum_per_layer(backbone: Backbone) -> None:
    layers = [product(6, rank, 32, seed=rank) for rank in (1, 2, 4)]
    found = spectra(torch.cat(layers), torch.cat(layers[:1] + layers[:1] + layers[2:]), num_matrices=3)
    numbers = {name: spectrum.numerical for name, spectrum in found.items() if not name.startswith("centered")}
    assert numbers == {
        "prompt of matrix 1": 1,
        "prompt of matrix 2": 2,
        "prompt of matrix 3": 4,
        "update of matrix 1": 0,
        "update of matrix 2": 3,
        "update of matrix 3": 0,
    }
    assert (
        LoadedPrompt(name="deep", folder=Path("deep"), prompt=Folded(torch.cat(layers), num_matrices=3)).max_rank == 6
    )
