"""The report's plots: learning curves, score by trainable parameters, score by learning rate."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from matplotlib.figure import Figure

from softprompt.analysis.report.grid import CONDITIONS, Grid, Row, best_by, label
from softprompt.analysis.report.groups import Group, method_settings
from softprompt.analysis.report.learning_curves import Curve, development_curve, loss_curve, smoothing_window
from softprompt.analysis.report.plot_style import (
    INK,
    Plot,
    Style,
    dash,
    legend,
    legend_height,
    log_axis,
    render_plot,
    styles,
)

_MAX_LINES = 8
"""Lines in a learning curve; with more rows only each method's best on development is shown."""
Split = Literal["dev", "test"]


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """The points of one method in a panel, with the ends of their error bars, in percent."""

    method: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def plot_learning(grid: Grid, number: int, column: str) -> Plot | None:
    """Training loss and development score by step, of the task with this number; None without any curve."""
    with_curve = [(row, group) for row, group in grid.of_column(column) if all(run.curve for run in group.results)]
    if not with_curve:
        return None
    plotted = with_curve
    if len(with_curve) > _MAX_LINES:
        best = best_by([group for _, group in with_curve], lambda group: group.method)
        plotted = [(row, group) for row, group in with_curve if any(group is other for other in best)]
    window = smoothing_window([group for _, group in plotted])
    by_method, dashes = styles(row.method for row, _ in with_curve), _row_numbers([row for row, _ in plotted])

    def draw(figure: Figure) -> None:
        losses, scores = figure.subplots(1, 2)
        for index, (row, group) in enumerate(plotted):
            style = by_method[row.method]
            line = {"color": style.color, "linestyle": dash(dashes[row.label]), "label": row.label}
            line |= {"marker": style.marker, "markersize": 5}
            _band(losses, loss_curve(group, window), 1.0, {**line, "markevery": (index % 5, 5)})
            _band(scores, development_curve(group), 100.0, line)
        smoothed = f" (means of {window} steps)" if window > 1 else ""
        losses.set(xlabel="optimizer step", ylabel=_loss_name(plotted), title=f"Training loss{smoothed}")
        scores.set(xlabel="optimizer step", ylabel=f"{plotted[0][1].metric} (%)", title="Development score")
        legend(figure, scores)

    note = f" Of {len(with_curve)} rows each method's best on development is shown."
    return render_plot(
        f"learning-{number}",
        f"Learning curves: {column}",
        "Means over seeds, with a band of one standard deviation, at the steps that all seeds have."
        + (note if len(plotted) < len(with_curve) else ""),
        draw,
        (8.4, 3.5 + legend_height(len(plotted))),
    )


def _loss_name(plotted: Sequence[tuple[Row, Group]]) -> str:
    """What the rows' training minimized: distilled prompts have another loss than those trained on labels."""
    distilled = {bool(result.distillation) for _, group in plotted for result in group.results}
    names = {True: "divergence from the teacher", False: "cross-entropy"}
    return " or ".join(names[kind] for kind in sorted(distilled)) + " (nats)"


def _band(axes: Any, curve: Curve, unit: float, line: Mapping[str, Any]) -> None:
    means = [unit * mean for mean in curve.means]
    pairs = list(zip(means, (unit * deviation for deviation in curve.deviations), strict=True))
    axes.plot(curve.steps, means, **line)
    if any(curve.deviations):
        lows, highs = [mean - deviation for mean, deviation in pairs], [mean + deviation for mean, deviation in pairs]
        axes.fill_between(curve.steps, lows, highs, color=line["color"], alpha=0.15, linewidth=0)


def plot_sizes(grid: Grid) -> Plot:
    """The test score by the number of trainable parameters, a panel per task."""
    label_names = [name for name in CONDITIONS if name not in grid.common]

    def draw(axes: Any, column: str) -> list[Line]:
        cells = [group for _, group in grid.of_column(column)]
        groups = best_by(cells, lambda group: [group.method, _conditions(group), _settings(group)])
        groups = sorted(groups, key=lambda group: group.spread("trainable").mean)
        majority = 100 * statistics.fmean(group.spread("majority").mean for group in groups)
        axes.axhline(majority, color=INK, linestyle=(0, (2, 2)), linewidth=1)
        position = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
        axes.annotate("majority answer", (0.99, majority), **position, ha="right", fontsize=8)
        axes.set_xlabel("trainable parameters (log)")
        return [
            Line(
                method=line[0].method,
                label=label(line[0].method, line[0].settings, label_names),
                x=[group.spread("trainable").mean for group in line],
                y=[100 * group.spread("test").mean for group in line],
                lows=[100 * group.rows_interval.low for group in line],
                highs=[100 * group.rows_interval.high for group in line],
            )
            for line in _lines(groups, lambda group: [group.method, _conditions(group), _settings(group, int)])
        ]

    caption = (
        "Test score, averaged over seeds; bars are the 95% interval over test rows of a single run. A line joins rows "
        "that differ in the prompt's size; of those that differ in their training, the best on development is shown."
    )
    return _panels(grid, grid.columns, ("sizes", "Score by trainable parameters", caption), draw, "test")


def plot_rates(grid: Grid, split: Split) -> Plot | None:
    """The score by learning rate, for tasks where a row was trained with several; None without such a task."""

    def lines(column: str) -> list[list[Group]]:
        groups = sorted((group for _, group in grid.of_column(column)), key=lambda group: float(group.settings["lr"]))
        by_row = _lines(groups, lambda group: [group.method, {**group.settings, "lr": None}])
        return [line for line in by_row if len(line) > 1]

    columns = [column for column in grid.columns if lines(column)]
    if not columns:
        return None

    def draw(axes: Any, column: str) -> list[Line]:
        axes.set_xlabel("learning rate (log)")
        drawn = []
        for line in lines(column):
            spreads = [group.spread(split) for group in line]
            label_names = [name for name in grid.differing[line[0].method] if name != "lr"]
            drawn.append(
                Line(
                    method=line[0].method,
                    label=label(line[0].method, line[0].settings, label_names),
                    x=[float(group.settings["lr"]) for group in line],
                    y=[100 * spread.mean for spread in spreads],
                    lows=[100 * (spread.mean - (spread.deviation or 0)) for spread in spreads],
                    highs=[100 * (spread.mean + (spread.deviation or 0)) for spread in spreads],
                )
            )
        return drawn

    lead = {"dev": "Development score, which selects a rate", "test": "Test score, which must not select a rate"}
    caption = f"{lead[split]}; averaged over seeds, bars are one standard deviation. A line's rows differ in no more."
    return _panels(grid, columns, (f"rates-{split}", "Score by learning rate", caption), draw, split)


def _conditions(group: Group) -> dict[str, Any]:
    return {name: group.settings[name] for name in CONDITIONS}


def _settings(group: Group, except_type: type | None = None) -> dict[str, Any]:
    """The method's own settings without those of a type; integers are its size."""
    settings = method_settings(group.results[0].run.experiment)
    return {name: value for name, value in settings.items() if type(value) is not except_type}


def _lines(groups: Sequence[Group], key: Callable[[Group], Any]) -> list[list[Group]]:
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(json.dumps(key(group), sort_keys=True), []).append(group)
    return list(lines.values())


def _draw_lines(axes: Any, lines: Sequence[Line], by_method: Mapping[str, Style]) -> None:
    counts: dict[str, int] = {}
    for line in lines:
        index = counts[line.method] = counts.get(line.method, -1) + 1
        # A bootstrap interval, averaged over seeds, need not contain the mean.
        below = [max(0.0, mean - low) for mean, low in zip(line.y, line.lows, strict=True)]
        above = [max(0.0, high - mean) for mean, high in zip(line.y, line.highs, strict=True)]
        style = by_method[line.method]
        look = {"color": style.color, "marker": style.marker, "linestyle": dash(index)}
        axes.errorbar(line.x, line.y, yerr=[below, above], elinewidth=1, capsize=2.5, label=line.label, **look)
    log_axis(axes, [value for line in lines for value in line.x])


def _panels(
    grid: Grid,
    columns: Sequence[str],
    texts: tuple[str, str, str],
    draw: Callable[[Any, str], list[Line]],
    split: Split,
) -> Plot:
    """A panel per task; `texts` are the name, title and caption."""
    width = 2 if len(columns) == 4 else min(3, len(columns))
    height = -(-len(columns) // width)
    by_method = styles(row.method for row in grid.rows)

    def draw_all(figure: Figure) -> None:
        panels = list(figure.subplots(height, width, squeeze=False).flat)
        for axes, column in zip(panels, columns, strict=False):
            _draw_lines(axes, draw(axes, column), by_method)
            axes.set(title=column, ylabel=f"{split} {grid.of_column(column)[0][1].metric} (%)")
        for axes in panels[len(columns) :]:
            axes.set_axis_off()
        legend(figure, *panels[: len(columns)])

    lines = len({row.method for row in grid.rows})
    return render_plot(*texts, draw_all, (max(5.2, 3.3 * width), 2.9 * height + legend_height(lines)))


def _row_numbers(rows: Sequence[Row]) -> dict[str, int]:
    """The position of each row among its method's rows."""
    counts: dict[str, int] = {}
    numbers = {}
    for row in rows:
        numbers[row.label] = counts.get(row.method, 0)
        counts[row.method] = numbers[row.label] + 1
    return numbers
