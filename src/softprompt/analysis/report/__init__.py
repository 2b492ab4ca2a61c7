"""Tables, pictures and a page of what came out of runs."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from softprompt import files, runs
from softprompt.analysis.report import formats, tables
from softprompt.analysis.report.compare import Difference, differences
from softprompt.analysis.report.grid import Grid, arrange
from softprompt.analysis.report.groups import group
from softprompt.analysis.report.read import SkippedRun, read

if TYPE_CHECKING:
    from softprompt.analysis.report.drawing import Picture
    from softprompt.analysis.report.pictures import Split

Form = Literal["text", "markdown", "csv", "latex"]


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found and written."""

    grid: Grid
    """What the tables show."""
    differences: tuple[Difference, ...]
    left_out: tuple[SkippedRun, ...]
    files: tuple[Path, ...]
    """All that was written; the page is first."""
    tables: tuple[tables.Table, ...]

    def written(self, form: Form) -> str:
        """The tables in a format, as the file of that format has them."""
        return formats.written(form, self.tables, self.grid)


def report(
    folders: Sequence[str | Path],
    *,
    out: str | Path = "report",
    compare: str | None = None,
    choose: bool = False,
    rates_on: "Split" = "dev",
    title: str = "Prompt runs compared",
) -> Report:
    """Write tables, pictures and a page of every finished run in and below `folders`; the others are named.

    Runs that differ in nothing but the seed are one row's score on a task; nothing else is ever averaged.

    Args:
        folders: runs, or folders that hold runs.
        out: the folder that is written; files of an earlier report there are replaced.
        compare: a row or a method; every other row's difference to it is shown, paired by seed.
        choose: of each method and task show the settings with the best development score alone.
        rates_on: the split whose score is drawn against the learning rate.
        title: of the page.

    Raises:
        FileNotFoundError: one of `folders` is not there.
        ModuleNotFoundError: without the extra `report`.
        ValueError: no finished run, no row named `compare`, or `out` is a run itself.
    """
    _need_extra()
    place = Path(out).expanduser()
    if (place / runs.RECORD).exists():
        raise ValueError(f"{place} is a run, and a report is not written into one; choose another --out")
    results, unread = read(folders)
    groups, doubled = group(results)
    left_out = (*unread, *doubled)
    if not groups:
        asked = ", ".join(map(str, folders)) or "no folder"
        why = f": {left_out[0].folder}: {left_out[0].reason}" if left_out else ""
        raise ValueError(f"there is no finished run in {asked}{why}")
    grid = arrange(groups, choose=choose)
    found = tuple(differences(grid, compare)) if compare else ()
    shown = [tables.scores(grid), tables.details(grid)]
    compared = tables.comparison(found, compare) if compare else None
    pictures = _pictures(arrange(groups), rates_on)
    from softprompt.analysis.report.page import page

    texts = {"report.html": page(title, grid, shown, compared, pictures, left_out)}
    shown += [compared] if compared else []
    texts |= {formats.FORMATS[form][0]: formats.written(form, shown, grid) for form in formats.FORMATS}
    texts["results.json"] = formats.json_text(formats.whole(grid, found, left_out))
    written = [*_write_texts(place, texts), *_write_pictures(place, [one for _, some in pictures for one in some])]
    return Report(grid=grid, differences=found, left_out=left_out, files=tuple(written), tables=tuple(shown))


def _pictures(grid: Grid, rates_on: "Split") -> "list[tuple[str, list[Picture]]]":
    from softprompt.analysis.report import pictures

    learning = [pictures.learning(grid, number, column) for number, column in enumerate(grid.columns, 1)]
    rates = pictures.rates(grid, rates_on)
    return [
        ("Score against trainable parameters", [pictures.sizes(grid)]),
        ("Score against learning rate", [rates] if rates else []),
        ("Learning curves", [one for one in learning if one]),
    ]


def _write_texts(place: Path, texts: dict[str, str]) -> list[Path]:
    for name, text in texts.items():
        files.write_text(place / name, text)
    return [place / name for name in texts]


def _write_pictures(place: Path, pictures: "Sequence[Picture]") -> list[Path]:
    written = []
    for one in pictures:
        with files.atomic_write(place / f"{one.name}.png") as draft:
            draft.write_bytes(one.png)
        files.write_text(place / f"{one.name}.svg", one.svg)
        written += [place / f"{one.name}.png", place / f"{one.name}.svg"]
    return written


def _need_extra() -> None:
    if missing := [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"a report needs the extra `report` ({', '.join(missing)}); install it: pip install 'softprompt[report]'"
        )
