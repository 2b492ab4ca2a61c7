"""A drawing as files and as a part of a page: its type, colours and axes."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: no global state, no display
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

INK = "#1b1d21"
"""Of text and axes: in an inline SVG it becomes the page's own text colour."""
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
class Picture:
    """A drawing, as files and for a page."""

    name: str
    """The files' stem."""
    title: str
    caption: str
    png: bytes
    svg: str

    @property
    def inline(self) -> str:
        """The SVG as a part of an HTML page: in the page's text colour, its names no other picture's."""
        svg = re.sub(r"<metadata>.*?</metadata>", "", self.svg[self.svg.index("<svg") :], flags=re.DOTALL)
        head, rest = svg.split(">", 1)
        widest = 1.6 * float(re.findall(r'width="([\d.]+)pt"', head)[0])
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", rest).replace(INK, "currentColor")
        return f'{head} role="img" style="--wide:{widest:.0f}px">{rest}'


def drawn(name: str, title: str, caption: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> Picture:
    """What `draw` puts on an empty figure of `size` inches; equal drawings are equal bytes."""
    with rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for both files
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Picture(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def log_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers: one label a decade, or at the values where there are few."""
    axes.set_xscale("log")
    few = sorted(set(values))
    if len(few) <= 3 or few[-1] < 10 * few[0]:
        axes.xaxis.set_major_locator(FixedLocator(few))
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
    """Below the panels, each label once."""
    found = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    widest = max((len(label) for label in found), default=1)
    across = max(1, min(len(found), int(figure.get_figwidth() * 13 / (widest + 7))))
    figure.legend(list(found.values()), list(found), loc="outside lower left", ncols=across)


def legend_height(lines: int) -> float:
    """About how many inches a legend of so many lines takes."""
    return 0.22 * -(-lines // 3) + 0.1
