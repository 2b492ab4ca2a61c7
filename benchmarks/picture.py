"""A picture of what the benchmarks printed: how many times as fast as its peer each case is.

    python benchmarks/train_step.py > build/train_step.json
    python benchmarks/picture.py build/*.json --out docs/speed.svg

Takes the files that benchmarks' stdout was kept in, of those whose last line has `cases` (benchmarks/sides.py). A bar
is the median over rounds, its line the smallest and the largest, and 1 is the peer's speed.
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
from softprompt.analysis.report.drawing import drawn


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is drawn."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """Files with a benchmark's last line."""
    out: Path = Path("speed.svg")
    """The picture, and beside it the same as .png."""

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("there is nothing to draw; give the files that benchmarks' stdout was kept in")


def cases(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each case with its name.

    Raises:
        ValueError: the file's last line is no benchmark's.
    """
    try:
        found = json.loads(file.read_text().splitlines()[-1])
        return [(name(found["benchmark"], one), one) for one in found["cases"]]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the last line of {file} holds no cases ({error}); give what a benchmark printed") from None


def name(benchmark: str, case: dict[str, Any]) -> str:
    """What was compared, and its shape."""
    rows = f"{case['batch']} x {case['tokens']} tokens, prompt {case['length']}"
    return f"{benchmark}: {case['ours']} against {case['peer']}\n{rows}, {case['dtype']}"


def picture(named: Sequence[tuple[str, dict[str, Any]]], out: Path) -> None:
    """One bar a case, in their order from the top."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(named))[::-1]
        ratios = [case["ratio"] for _, case in named]
        lines = [[case["ratio"] - case["spread"][0], case["spread"][1] - case["ratio"]] for _, case in named]
        axes.barh(places, ratios, xerr=list(zip(*lines, strict=True)), height=0.62, color="#3b6ea5", ecolor="#1b1d21")
        for place, (_, case) in zip(places, named, strict=True):
            axes.annotate(f" {case['ratio']:.1f}", (case["spread"][1], place), va="center")
        axes.axvline(1, color="#1b1d21", linewidth=0.8)
        axes.set_yticks(places, [label for label, _ in named], fontsize="small")
        axes.set_xlim(0, 1.12 * max(case["spread"][1] for _, case in named))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("times as fast as the peer (median; line: smallest and largest of the rounds)")

    made = drawn("speed", "Speed", "", draw, (8.6, 1.0 + 0.52 * len(named)))
    files.write_text(out, made.svg)
    out.with_suffix(".png").write_bytes(made.png)


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    try:
        picture([case for file in settings.results for case in cases(file)], settings.out)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
