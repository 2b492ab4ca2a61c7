"""Plots of ranks, gradients and burstiness, as PNG and SVG; they need the extra `report`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt import files
from softprompt.analysis.rank.burstiness import Burstiness, Pair, bin_centers
from softprompt.analysis.rank.gradient import GradientPoint
from softprompt.analysis.rank.prompt_ranks import PromptRanks
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.analysis.rank.truncation import FunctionalRank

_VIEWS = {"prompt": "prompt P", "centered": "P less its mean row", "update": "update P − P₀"}
_RANKS = {"numerical": "numerical rank", "stable": "stable rank", "effective": "effective rank"}
_MAX_LEGEND_LINES = 10
"""With more lines the legend is omitted."""
_MAX_TICKS = 10
"""Up to this many ranks all get a tick; of more, only the powers of two and the last."""
_MAX_COLUMNS = 3


def check_matplotlib() -> None:
    """Fail before the work starts, not after it.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need matplotlib; install it in softprompt's clone with: pip install '.[report]'"
        )


def draw_ranks(measured: Sequence[PromptRanks], folder: Path) -> list[Path]:
    """Singular values; ranks over training where they were measured; score by rank where truncations were scored.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_matplotlib()
    paths = _save(_spectra_figure(measured), folder, "singular_values")
    if any(ranks.history for ranks in measured):
        paths += _save(_history_figure(measured), folder, "ranks_over_training")
    if any(ranks.functional is not None for ranks in measured):
        paths += _save(_scores_figure(measured), folder, "score_by_rank")
    return paths


def draw_burstiness(measured: Burstiness, title: str, folder: Path) -> list[Path]:
    """Densities of inputs and products before and after whitening, and the kurtosis of each head.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_matplotlib()
    figure = _figure(3, 1)
    inputs, products, heads = figure.subplots(1, 3)
    _densities(inputs, measured.inputs, "input vectors X")
    _densities(products, measured.products, "products X (W_q W_kᵀ)ᵀ")
    numbers = range(len(measured.heads))
    heads.scatter(numbers, [pair.before.kurtosis for pair in measured.heads], label="as they are", color="C3")
    heads.scatter(numbers, [pair.after.kurtosis for pair in measured.heads], label="whitened", color="C0")
    heads.axhline(3, color="0.5", linestyle="--", label="Gaussian")
    heads.set(xlabel="head", ylabel="kurtosis of its products", title="per head")
    heads.set_ylim(bottom=0)
    heads.legend(fontsize="small")
    figure.suptitle(title, parse_math=False)
    return _save(figure, folder, "burstiness")


def draw_gradients(points: Sequence[GradientPoint], title: str, folder: Path) -> list[Path]:
    """The share of the gradient's energy in its first k directions, one line per prompt.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_matplotlib()
    figure = _figure(1, 1)
    axes = figure.subplots(1, 1)
    for point in points:
        ranks = range(1, len(point.spectrum.values) + 1)
        axes.plot(ranks, [point.energy(rank) for rank in ranks], marker=".", linewidth=1, label=point.at)
    axes.set(xlabel="directions k", ylabel="share of the gradient's energy", title=title)
    axes.set_ylim(0, 1.02)
    _legend(figure)
    return _save(figure, folder, "gradient_energy")


def _figure(columns: int, rows: int) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    _show_names_as_they_are(figure)
    paths = []
    for kind in ("png", "svg"):
        with files.atomic_write(folder / f"{name}.{kind}") as draft:
            figure.savefig(draft, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
        paths.append(folder / f"{name}.{kind}")
    return paths


def _show_names_as_they_are(figure: Any) -> None:
    """Titles and legends hold names, where a dollar sign is a dollar sign; ticks of a logarithmic axis are formulas."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [text for legend in legends if legend is not None for text in legend.get_texts()]
    for text in [*texts, *(axes.title for axes in figure.axes)]:
        text.set_parse_math(False)


def _label(name: str) -> str:
    """A line's label; matplotlib leaves one that begins with an underscore out of the legend."""
    return f" {name}" if name.startswith("_") else name


def _of_view(spectra: Mapping[str, Spectrum], view: str) -> dict[str, Spectrum]:
    """The spectra of one view by the suffix of their name: empty, or ` of matrix 2` in a deep prompt."""
    return {name.removeprefix(view): spectrum for name, spectrum in spectra.items() if name.startswith(view)}


def _spectra_figure(measured: Sequence[PromptRanks]) -> Any:
    views = [view for view in _VIEWS if any(_of_view(ranks.spectra, view) for ranks in measured)]
    figure = _figure(len(views), 1)
    for axes, view in zip(figure.subplots(1, len(views), squeeze=False, sharey=True)[0], views, strict=True):
        for ranks in measured:
            for layer, spectrum in _of_view(ranks.spectra, view).items():
                values = spectrum.values[: spectrum.numerical]  # the rest is rounding error
                axes.plot(
                    range(1, len(values) + 1), values, marker=".", linewidth=1, label=_label(ranks.loaded.name + layer)
                )
        axes.set(xlabel="number", ylabel="singular value", yscale="log", title=_VIEWS[view])
    _legend(figure)
    return figure


def _history_figure(measured: Sequence[PromptRanks]) -> Any:
    views = [
        view
        for view in _VIEWS
        if any(_of_view(spectra, view) for ranks in measured for spectra in ranks.history.values())
    ]
    figure = _figure(len(_RANKS), len(views))
    grid = figure.subplots(len(views), len(_RANKS), squeeze=False)
    for row, view in zip(grid, views, strict=True):
        for axes, (kind, title) in zip(row, _RANKS.items(), strict=True):
            for ranks in measured:
                for layer in _of_view(ranks.spectra, view):
                    points = [(step, getattr(spectra[view + layer], kind)) for step, spectra in ranks.history.items()]
                    steps, values = zip(*points, strict=True)
                    axes.plot(steps, values, marker=".", label=_label(ranks.loaded.name + layer))
            axes.set(xlabel="step", ylabel=title, title=_VIEWS[view])
            axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1))
    _legend(figure)
    return figure


def _scores_figure(measured: Sequence[PromptRanks]) -> Any:
    scored = [(ranks.loaded.name, ranks.functional) for ranks in measured if ranks.functional is not None]
    columns = min(len(scored), _MAX_COLUMNS)
    rows = -(-len(scored) // columns)
    figure = _figure(columns, rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, functional) in zip(panels, scored, strict=False):
        _score_panel(axes, name, functional)
    for axes in panels[len(scored) :]:
        axes.set_visible(False)
    return figure


def _score_panel(axes: Any, name: str, functional: FunctionalRank) -> None:
    truncations, full, part = functional.truncations, functional.full, _VIEWS[functional.part]
    ranks = [truncated.rank for truncated in truncations]
    scores = [truncated.score.value for truncated in truncations]
    axes.axhspan(full.ci_low, full.ci_high, color="C0", alpha=0.15, label="full score, 95 % interval")
    axes.axhline(full.value, color="C0", linewidth=1)
    axes.axhline(full.majority, color="0.5", linestyle="--", linewidth=1, label="majority answer")
    errors = [
        [truncated.score.value - truncated.score.ci_low for truncated in truncations],
        [truncated.score.ci_high - truncated.score.value for truncated in truncations],
    ]
    label = f"{part} truncated to rank k"
    axes.errorbar(ranks, scores, yerr=errors, marker="o", color="C1", linewidth=1, elinewidth=0.6, label=label)
    if (rank := functional.rank_by_significance) is not None:
        axes.axvline(rank, color="C2", linestyle=":", label=f"no significant loss from {rank}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    powers = sorted({rank for rank in ranks if rank & (rank - 1) == 0} | {ranks[-1]})  # 0, 1, 2, 4, ... and the last
    ticks = ranks if len(ranks) <= _MAX_TICKS else powers
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0.8 * ranks[0] if ranks[0] else -0.1, right=1.15 * ranks[-1] + 0.1)
    axes.set(xlabel=f"rank k of the {part}", ylabel=f"{functional.split} {full.metric} ({full.n} rows)", title=name)
    axes.legend(fontsize="x-small", loc="lower right")


def _densities(axes: Any, pair: Pair, title: str) -> None:
    import numpy as np

    centers = np.array(bin_centers())
    for distribution, name, color in ((pair.before, "as they are", "C3"), (pair.after, "whitened", "C0")):
        label = f"{name}: kurtosis {distribution.kurtosis:.3g}, {distribution.beyond:.2%} beyond 3"
        density = [value or np.nan for value in distribution.density]
        axes.step(centers, density, where="mid", color=color, label=label)
    axes.plot(centers, np.exp(-(centers**2) / 2) / np.sqrt(2 * np.pi), color="0.5", linestyle="--", label="Gaussian")
    axes.set(xlabel="standard deviations", ylabel="density", yscale="log", title=title)
    axes.set_ylim(bottom=1e-6)
    axes.legend(fontsize="x-small", loc="lower center")


def _legend(figure: Any) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) <= _MAX_LEGEND_LINES:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize="small")
