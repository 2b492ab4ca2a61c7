"""Plot the speedups that the benchmarks printed, one bar per case.

    python benchmarks/train_step.py > build/train_step.json
    python benchmarks/plot.py build/*.json --out docs/speed.svg

Reads files with the stdout of benchmarks whose last line has `cases` (benchmarks/harness.py). A bar is the median over
rounds, its error bar the minimum and the maximum; 1 is the peer's speed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from softprompt import files
from softprompt.analysis.report.plot_style import render_plot


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to plot."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files with the stdout of a benchmark."""
    out: Path = Path("speed.svg")
    """The SVG file; a PNG is written beside it."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("there are no results; give files with the stdout of benchmarks")


def read_cases(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The cases of a file with their labels.

    Raises:
        ValueError: the file's last line is not a benchmark's JSON.
    """
    try:
        result = json.loads(file.read_text().splitlines()[-1])
        return [(label(result["benchmark"], case), case) for case in result["cases"]]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the last line of {file} has no cases ({error}); give the stdout of a benchmark") from None


def label(benchmark: str, case: dict[str, Any]) -> str:
    """The sides and the shape."""
    rows = f"{case['batch_size']} x {case['tokens']} tokens, prompt {case['length']}"
    return f"{benchmark}: {case['ours']} against {case['peer']}\n{rows}, {case['dtype']}"


def plot(cases: Sequence[tuple[str, dict[str, Any]]], out: Path) -> None:
    """Draw one bar per case, the first at the top."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        positions = range(len(cases))[::-1]
        speedups = [case["speedup"] for _, case in cases]
        errors = [[case["speedup"] - case["spread"][0], case["spread"][1] - case["speedup"]] for _, case in cases]
        axes.barh(
            positions, speedups, xerr=list(zip(*errors, strict=True)), height=0.62, color="#3b6ea5", ecolor="#1b1d21"
        )
        for position, (_, case) in zip(positions, cases, strict=True):
            axes.annotate(f" {case['speedup']:.1f}", (case["spread"][1], position), va="center")
        axes.axvline(1, color="#1b1d21", linewidth=0.8)
        axes.set_yticks(positions, [text for text, _ in cases], fontsize="small")
        axes.set_xlim(0, 1.12 * max(case["spread"][1] for _, case in cases))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("speedup over the peer (median; error bar: minimum and maximum of the rounds)")

    rendered = render_plot("speed", "Speed", "", draw, (8.6, 1.0 + 0.52 * len(cases)))
    files.write_text(out, rendered.svg)
    out.with_suffix(".png").write_bytes(rendered.png)


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    try:
        plot([case for file in settings.results for case in read_cases(file)], settings.out)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
