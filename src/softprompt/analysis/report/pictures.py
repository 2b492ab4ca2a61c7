"""Pictures of results: learning curves, score against trainable parameters, score against learning rate."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from matplotlib.figure import Figure

from softprompt.analysis.report import curves
from softprompt.analysis.report.drawing import INK, Picture, drawn, legend, legend_height, log_axis
from softprompt.analysis.report.grid import CONDITIONS, Grid, Row, label
from softprompt.analysis.report.groups import Group, own_settings
from softprompt.analysis.report.palette import Style, dash, styles

_MOST = 8
"""Lines in a learning curve; of more rows each method's best on development is shown."""
Split = Literal["dev", "test"]


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """Points of one method in a panel, with the ends of their bars; percent."""

    method: str
    label: str
    at: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def learning(grid: Grid, number: int, column: str) -> Picture | None:
    """Training loss and development score over steps, of the `number`-th task; none without any curve."""
    there = [(row, group) for row, group in grid.of_column(column) if all(one.curve for one in group.results)]
    if not there:
        return None
    shown = there if len(there) <= _MOST else _best_by(there, lambda group: group.method)
    window = curves.window([group for _, group in shown])
    looks, places = styles(row.method for row, _ in there), _places([row for row, _ in shown])

    def draw(figure: Figure) -> None:
        losses, scores = figure.subplots(1, 2)
        for place, (row, group) in enumerate(shown):
            look = looks[row.method]
            line = {"color": look.colour, "linestyle": dash(places[row.label]), "label": row.label}
            line |= {"marker": look.marker, "markersize": 5}
            _band(losses, curves.loss(group, window), 1.0, {**line, "markevery": (place % 5, 5)})
            _band(scores, curves.development(group), 100.0, line)
        smoothed = f" (means of {window} steps)" if window > 1 else ""
        losses.set(xlabel="optimiser step", ylabel="cross-entropy (nats)", title=f"Training loss{smoothed}")
        scores.set(xlabel="optimiser step", ylabel=f"{shown[0][1].metric} (%)", title="Development score")
        legend(figure, scores)

    left = "" if len(shown) == len(there) else f" Of {len(there)} rows each method's best on development is shown."
    return drawn(
        f"learning-{number}",
        f"Learning curves: {column}",
        f"Means over seeds, with a band of one standard deviation, at the steps that all seeds have.{left}",
        draw,
        (8.4, 3.5 + legend_height(len(shown))),
    )


def _band(axes: Any, curve: curves.Curve, unit: float, line: Mapping[str, Any]) -> None:
    means = [unit * mean for mean in curve.means]
    ends = list(zip(means, (unit * deviation for deviation in curve.deviations), strict=True))
    axes.plot(curve.steps, means, **line)
    if any(curve.deviations):
        lows, highs = [mean - deviation for mean, deviation in ends], [mean + deviation for mean, deviation in ends]
        axes.fill_between(curve.steps, lows, highs, color=line["color"], alpha=0.15, linewidth=0)


def sizes(grid: Grid) -> Picture:
    """The test score against the trainable parameters, a panel a task."""
    told = [name for name in CONDITIONS if name not in grid.common]

    def draw(axes: Any, column: str) -> list[Line]:
        best = _best_by(grid.of_column(column), lambda group: [group.method, _kept(group, CONDITIONS), _own(group)])
        groups = sorted((group for _, group in best), key=lambda group: group.spread("trainable").mean)
        majority = 100 * statistics.fmean(group.spread("majority").mean for group in groups)
        axes.axhline(majority, color=INK, linestyle=(0, (2, 2)), linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 2), "textcoords": "offset points"}
        axes.annotate("majority answer", (0.99, majority), **place, ha="right", fontsize=8)
        axes.set_xlabel("trainable parameters (log)")
        return [
            Line(
                method=line[0].method,
                label=label(line[0].method, line[0].settings, told),
                at=[group.spread("trainable").mean for group in line],
                means=[100 * group.spread("test").mean for group in line],
                lows=[100 * group.rows_interval.low for group in line],
                highs=[100 * group.rows_interval.high for group in line],
            )
            for line in _lines(groups, lambda group: [group.method, _kept(group, CONDITIONS), _own(group, int)])
        ]

    caption = (
        "Test score, a mean over seeds; bars are the 95% interval over test rows of a single run. A line joins rows "
        "that differ in the prompt's size; of those that differ in how they were trained, the best on development is "
        "shown."
    )
    return _panels(grid, grid.columns, ("sizes", "Score against trainable parameters", caption), draw, "test")


def rates(grid: Grid, split: Split) -> Picture | None:
    """The score against the learning rate, for tasks where a row was tried with several; else none."""

    def lines(column: str) -> list[list[Group]]:
        groups = sorted((group for _, group in grid.of_column(column)), key=lambda group: float(group.settings["lr"]))
        found = _lines(groups, lambda group: [group.method, {**group.settings, "lr": None}])
        return [line for line in found if len(line) > 1]

    columns = [column for column in grid.columns if lines(column)]
    if not columns:
        return None

    def draw(axes: Any, column: str) -> list[Line]:
        axes.set_xlabel("learning rate (log)")
        found = []
        for line in lines(column):
            spreads = [group.spread(split) for group in line]
            told = [name for name in grid.differing[line[0].method] if name != "lr"]
            found.append(
                Line(
                    method=line[0].method,
                    label=label(line[0].method, line[0].settings, told),
                    at=[float(group.settings["lr"]) for group in line],
                    means=[100 * spread.mean for spread in spreads],
                    lows=[100 * (spread.mean - (spread.deviation or 0)) for spread in spreads],
                    highs=[100 * (spread.mean + (spread.deviation or 0)) for spread in spreads],
                )
            )
        return found

    of = {"dev": "Development score, by which a rate is chosen", "test": "Test score, by which no rate may be chosen"}
    caption = f"{of[split]}; a mean over seeds, bars are one standard deviation. A line's rows differ in nothing else."
    return _panels(grid, columns, (f"rates-{split}", "Score against learning rate", caption), draw, split)


def _kept(group: Group, names: Sequence[str]) -> dict[str, Any]:
    return {name: group.settings[name] for name in names}


def _own(group: Group, but: type | None = None) -> dict[str, Any]:
    """The method's own settings, but for those of a type: whole numbers are its size."""
    own = own_settings(group.results[0].run.experiment)
    return {name: value for name, value in own.items() if type(value) is not but}


def _best_by(there: Sequence[tuple[Row, Group]], key: Callable[[Group], Any]) -> list[tuple[Row, Group]]:
    """Of those with an equal key the one with the best development score."""
    best: dict[str, tuple[Row, Group]] = {}
    for row, group in there:
        place = json.dumps(key(group), sort_keys=True)
        if place not in best or best[place][1].spread("dev").mean < group.spread("dev").mean:
            best[place] = (row, group)
    return list(best.values())


def _lines(groups: Sequence[Group], family: Callable[[Group], Any]) -> list[list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(json.dumps(family(group), sort_keys=True), []).append(group)
    return list(found.values())


def _draw_lines(axes: Any, lines: Sequence[Line], looks: Mapping[str, Style]) -> None:
    seen: dict[str, int] = {}
    for line in lines:
        place = seen[line.method] = seen.get(line.method, -1) + 1
        # A bootstrap's interval need not hold the mean of other seeds' scores.
        below = [max(0.0, mean - low) for mean, low in zip(line.means, line.lows, strict=True)]
        above = [max(0.0, high - mean) for mean, high in zip(line.means, line.highs, strict=True)]
        look = {"color": looks[line.method].colour, "marker": looks[line.method].marker, "linestyle": dash(place)}
        axes.errorbar(line.at, line.means, yerr=[below, above], elinewidth=1, capsize=2.5, label=line.label, **look)
    log_axis(axes, [value for line in lines for value in line.at])


def _panels(
    grid: Grid,
    columns: Sequence[str],
    words: tuple[str, str, str],
    draw: Callable[[Any, str], list[Line]],
    split: Split,
) -> Picture:
    across = 2 if len(columns) == 4 else min(3, len(columns))
    down = -(-len(columns) // across)
    looks = styles(row.method for row in grid.rows)

    def draw_all(figure: Figure) -> None:
        panels = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, column in zip(panels, columns, strict=False):
            _draw_lines(axes, draw(axes, column), looks)
            axes.set(title=column, ylabel=f"{split} {grid.of_column(column)[0][1].metric} (%)")
        for axes in panels[len(columns) :]:
            axes.set_axis_off()
        legend(figure, *panels[: len(columns)])

    lines = len({row.method for row in grid.rows})
    return drawn(*words, draw_all, (max(5.2, 3.3 * across), 2.9 * down + legend_height(lines)))


def _places(rows: Sequence[Row]) -> dict[str, int]:
    """Which of its method's rows each is."""
    seen: dict[str, int] = {}
    places = {}
    for row in rows:
        places[row.label] = seen.get(row.method, 0)
        seen[row.method] = places[row.label] + 1
    return places
