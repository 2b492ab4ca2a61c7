"""The look of all plots: a color, marker and dash per method, fonts and axes, and rendering to PNG and SVG."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from softprompt.prompts import METHODS
from softprompt.types import Baseline

_Colors = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#808080")
"""Okabe and Ito's color-blind-safe palette, without black and yellow, which vanish on a dark or a light background."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", "*")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)


@final
@dataclass(frozen=True, kw_only=True)
class Style:
    """A method's color and marker; the marker alone also identifies it."""

    color: str
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Fixed styles for the library's methods and baselines, then for the other methods by name."""
    # A user's method must not change the colors of the library's.
    builtin = [name for name in sorted(METHODS) if METHODS[name].__module__.startswith("softprompt.")]
    builtin += [name for name in get_args(Baseline) if name != "none"]
    names = [*builtin, *sorted(set(methods) - set(builtin))]
    return {
        name: Style(color=_Colors[index % len(_Colors)], marker=_MARKERS[index % len(_MARKERS)])
        for index, name in enumerate(names)
    }


def dash(index: int) -> Any:
    """The dash pattern of a method's first, second, ... row."""
    return _DASHES[index % len(_DASHES)]


INK = "#1b1d21"
"""The color of text and axes; an inline SVG takes the page's text color instead."""
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#808080",
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 6,
}


@final
@dataclass(frozen=True, kw_only=True)
class Plot:
    """A rendered plot."""

    name: str
    """The stem of its file names."""
    title: str
    caption: str
    png: bytes
    svg: str

    @property
    def inline(self) -> str:
        """The SVG as part of an HTML page: in the page's text color, with ids that no other plot uses."""
        svg = re.sub(r"<metadata>.*?</metadata>", "", self.svg[self.svg.index("<svg") :], flags=re.DOTALL)
        head, rest = svg.split(">", 1)
        widest = 1.6 * float(re.findall(r'width="([\d.]+)pt"', head)[0])
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", rest).replace(INK, "currentColor")
        return f'{head} role="img" style="--wide:{widest:.0f}px">{rest}'


def render_plot(name: str, title: str, caption: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> Plot:
    """Call `draw` on an empty figure of `size` inches and render it; equal figures give equal bytes."""
    with rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # keeps the layout equal in both files
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Plot(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def log_axis(axes: Any, values: Sequence[float]) -> None:
    """Make the x axis logarithmic, with plain numbers: a label per decade, or at the values where they are few."""
    axes.set_xscale("log")
    distinct = sorted(set(values))
    if len(distinct) <= 3 or distinct[-1] < 10 * distinct[0]:
        axes.xaxis.set_major_locator(FixedLocator(distinct))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(values) / 1.6, max(values) * 1.6)


def _short(value: float) -> str:
    for letter, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def legend(figure: Figure, *axes: Any) -> None:
    """Draw one legend below all panels, with each label once."""
    by_label = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    widest = max((len(label) for label in by_label), default=1)
    columns = max(1, min(len(by_label), int(figure.get_figwidth() * 13 / (widest + 7))))
    figure.legend(list(by_label.values()), list(by_label), loc="outside lower left", ncols=columns)


def legend_height(lines: int) -> float:
    """The approximate height in inches of a legend with this many lines."""
    return 0.22 * -(-lines // 3) + 0.1
