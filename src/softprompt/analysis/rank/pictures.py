"""Pictures of ranks and of burstiness, as PNG and SVG; they need the extra `report`."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softprompt import files
from softprompt.analysis.rank.burstiness import Burstiness, Pair, bin_centres
from softprompt.analysis.rank.functional import Functional
from softprompt.analysis.rank.gradient import GradientPoint
from softprompt.analysis.rank.measured import Measured
from softprompt.analysis.rank.spectrum import Spectrum

_VIEWS = {"prompt": "prompt P", "centred": "P less its mean row", "update": "learned, P − P₀"}
_RANKS = {"numerical": "numerical rank", "stable": "stable rank", "effective": "effective rank"}
_MOST_NAMES = 10
"""Lines beyond which a legend says nothing more."""
_TICKS = 10
"""Ranks that are all named below the axis; of more, the powers of two and the last."""
_COLUMNS = 3


def refuse_without_matplotlib() -> None:
    """Say so before the work, not after it.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("pictures need matplotlib; install it with: pip install 'softprompt[report]'")


def draw_ranks(measured: Sequence[Measured], folder: Path) -> list[Path]:
    """Singular values; ranks over training where it was measured; score against rank where cuts were scored.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    refuse_without_matplotlib()
    made = _save(_spectra(measured), folder, "singular_values")
    if any(found.course for found in measured):
        made += _save(_course(measured), folder, "ranks_over_training")
    if any(found.functional is not None for found in measured):
        made += _save(_scores(measured), folder, "score_by_rank")
    return made


def draw_burstiness(found: Burstiness, title: str, folder: Path) -> list[Path]:
    """Densities of inputs and products before and after whitening, and the kurtosis head by head.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    refuse_without_matplotlib()
    figure = _figure(3, 1)
    inputs, products, heads = figure.subplots(1, 3)
    _densities(inputs, found.inputs, "input vectors X")
    _densities(products, found.products, "products X (W_q W_kᵀ)ᵀ")
    numbers = range(len(found.heads))
    heads.scatter(numbers, [pair.before.kurtosis for pair in found.heads], label="as they are", color="C3")
    heads.scatter(numbers, [pair.after.kurtosis for pair in found.heads], label="whitened", color="C0")
    heads.axhline(3, color="0.5", linestyle="--", label="Gaussian")
    heads.set(xlabel="head", ylabel="kurtosis of its products", title="head by head")
    heads.set_ylim(bottom=0)
    heads.legend(fontsize="small")
    figure.suptitle(title)
    return _save(figure, folder, "burstiness")


def draw_gradients(points: Sequence[GradientPoint], title: str, folder: Path) -> list[Path]:
    """The share of the gradient's energy in its first k directions, a line for each prompt.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    refuse_without_matplotlib()
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
    made = []
    for kind in ("png", "svg"):
        with files.atomic_write(folder / f"{name}.{kind}") as draft:
            figure.savefig(draft, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
        made.append(folder / f"{name}.{kind}")
    return made


def _lines(ranks: Mapping[str, Spectrum], view: str) -> dict[str, Spectrum]:
    """The spectra of one view: one, or one a layer of a deep prompt, by what is to be said of the layer."""
    return {name.removeprefix(view): found for name, found in ranks.items() if name.startswith(view)}


def _spectra(measured: Sequence[Measured]) -> Any:
    shown = [view for view in _VIEWS if any(_lines(found.ranks, view) for found in measured)]
    figure = _figure(len(shown), 1)
    for axes, view in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown, strict=True):
        for found in measured:
            for layer, spectrum in _lines(found.ranks, view).items():
                kept = spectrum.values[: spectrum.numerical]  # below are roundings, which a log scale blows up
                numbers = range(1, len(kept) + 1)
                axes.plot(numbers, kept, marker=".", linewidth=1, label=found.subject.name + layer)
        axes.set(xlabel="number", ylabel="singular value", yscale="log", title=_VIEWS[view])
    _legend(figure)
    return figure


def _course(measured: Sequence[Measured]) -> Any:
    shown = [view for view in _VIEWS if any(_lines(at, view) for found in measured for at in found.course.values())]
    figure = _figure(len(_RANKS), len(shown))
    grid = figure.subplots(len(shown), len(_RANKS), squeeze=False)
    for row, view in zip(grid, shown, strict=True):
        for axes, (rank, title) in zip(row, _RANKS.items(), strict=True):
            for found in measured:
                for layer in _lines(found.ranks, view):
                    points = [(step, getattr(at[view + layer], rank)) for step, at in found.course.items()]
                    steps, values = zip(*points, strict=True)
                    axes.plot(steps, values, marker=".", label=found.subject.name + layer)
            axes.set(xlabel="step", ylabel=title, title=_VIEWS[view])
            axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1))
    _legend(figure)
    return figure


def _scores(measured: Sequence[Measured]) -> Any:
    scored = [(found.subject.name, found.functional) for found in measured if found.functional is not None]
    columns = min(len(scored), _COLUMNS)
    rows = -(-len(scored) // columns)
    figure = _figure(columns, rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, found) in zip(panels, scored, strict=False):
        _score_panel(axes, name, found)
    for axes in panels[len(scored) :]:
        axes.set_visible(False)
    return figure


def _score_panel(axes: Any, name: str, found: Functional) -> None:
    ranks = [cut.rank for cut in found.cuts]
    scores = [cut.score.value for cut in found.cuts]
    axes.axhspan(found.full.ci_low, found.full.ci_high, color="C0", alpha=0.15, label="full score, 95 % interval")
    axes.axhline(found.full.value, color="C0", linewidth=1)
    axes.axhline(found.full.majority, color="0.5", linestyle="--", linewidth=1, label="majority answer")
    errors = [
        [cut.score.value - cut.score.ci_low for cut in found.cuts],
        [cut.score.ci_high - cut.score.value for cut in found.cuts],
    ]
    axes.errorbar(
        ranks, scores, yerr=errors, marker="o", color="C1", linewidth=1, elinewidth=0.6, label="cut to rank k"
    )
    if found.paired is not None:
        axes.axvline(found.paired, color="C2", linestyle=":", label=f"no loss shown from {found.paired} on")
    axes.set_xscale("symlog", base=2, linthresh=1)
    powers = sorted({rank for rank in ranks if rank & (rank - 1) == 0} | {ranks[-1]})  # 0, 1, 2, 4, ... and the last
    shown = ranks if len(ranks) <= _TICKS else powers
    axes.set_xticks(shown, [str(rank) for rank in shown])
    axes.minorticks_off()
    axes.set_xlim(left=0.8 * ranks[0] if ranks[0] else -0.1, right=1.15 * ranks[-1] + 0.1)
    axes.set(
        xlabel=f"rank of the {found.part}",
        ylabel=f"{found.split} {found.full.metric} ({found.full.n} rows)",
        title=name,
    )
    axes.legend(fontsize="x-small", loc="lower right")


def _densities(axes: Any, pair: Pair, title: str) -> None:
    import numpy as np

    centres = np.array(bin_centres())
    for density, label, color in ((pair.before, "as they are", "C3"), (pair.after, "whitened", "C0")):
        words = f"{label}: kurtosis {density.kurtosis:.3g}, {density.beyond:.2%} beyond 3"
        axes.step(centres, [value or np.nan for value in density.density], where="mid", color=color, label=words)
    axes.plot(centres, np.exp(-(centres**2) / 2) / np.sqrt(2 * np.pi), color="0.5", linestyle="--", label="Gaussian")
    axes.set(xlabel="standard deviations", ylabel="density", yscale="log", title=title)
    axes.set_ylim(bottom=1e-6)
    axes.legend(fontsize="x-small", loc="lower center")


def _legend(figure: Any) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) <= _MOST_NAMES:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize="small")
