"""What came out of runs: read from their folders, with a reason for each that is left out."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt import runs
from softprompt.runs import Run

_NUMBERS = (
    "dev",
    "test",
    "majority",
    "ci_low",
    "ci_high",
    "n_dev",
    "n_test",
    "trainable",
    "seconds",
    "steps",
    "best_step",
)
_TENSORS = (runs.TENSORS, runs.HEAD, runs.TUNED)
_STUDY = "study.journal"
"""What the folder of a sweep's search holds beside its trials."""


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """A line of metrics.jsonl."""

    step: int
    loss: float
    dev: float | None
    """Of an evaluation after this step."""


@final
@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run; scores are fractions."""

    run: Run
    name: str
    """The folder's name, fit to print."""
    metric: str
    numbers: Mapping[str, float]
    """The record's results: `dev`, `test`, `majority`, `ci_low`, `ci_high`, `n_test`, `trainable` and so on."""
    extra_metrics: Mapping[str, float]
    """The task's further metrics on the test rows."""
    zero_shot: float | None
    """The test score of the model without a prompt."""
    selection_warning: str
    """What the record warns of; empty where it warns of nothing."""
    warning: str
    """Why the test score says less than it seems to; empty where nothing speaks against it."""
    size: int
    """Bytes of the tensors that were trained."""
    curve: tuple[Point, ...]

    @property
    def seed(self) -> int:
        """Of the experiment."""
        return self.run.experiment.seed


@final
@dataclass(frozen=True, kw_only=True)
class SkippedRun:
    """A run that is not in the report."""

    folder: str
    reason: str


def find(folders: Sequence[str | Path]) -> list[Path]:
    """Every run's folder among `folders` and anywhere below them, once, by path; a run is not searched for others.

    The folder of a search is there in place of its trials, unless it, or the one that it lies in, is given.

    Raises:
        FileNotFoundError: one of `folders` is not there.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        top = Path(folder).expanduser()
        if not top.is_dir():
            raise FileNotFoundError(f"{str(folder)!r} is no folder; give runs, or folders that hold runs")
        found.update(dict.fromkeys(_below(top)))
    # A run that is given twice under two names (a link, a relative path) is one run.
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _below(top: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(top):
        asked = top in (Path(place), Path(place).parent)
        if runs.RECORD in names or (_STUDY in names and not asked):
            inner.clear()
            yield Path(place)
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def read(folders: Sequence[str | Path]) -> tuple[list[Result], list[SkippedRun]]:
    """The finished runs, and those left out with the reason; raises as `find` does."""
    results: list[Result] = []
    left_out: list[SkippedRun] = []
    for folder in find(folders):
        if not (folder / runs.RECORD).is_file():
            # Of one seed, some stopped early: beside the runs that they chose settings for they would be rows too.
            reason = "trials of a search, by which settings were chosen; give this folder itself to see them"
            left_out.append(SkippedRun(folder=printable(str(folder)), reason=reason))
            continue
        try:
            results.append(_result(runs.open_run(folder)))
        except (ValueError, OSError, OverflowError, RecursionError) as error:
            left_out.append(SkippedRun(folder=printable(str(folder)), reason=printable(str(error))))
    return results, left_out


def _result(run: Run) -> Result:
    """The run's results.

    Raises:
        ValueError: it is not finished, or what its folder holds is damaged.
    """
    results = run.record.get("results")
    if results is None:
        raise ValueError(f"it is not finished; go on with: softprompt train --resume {run.folder}")
    if not isinstance(results, Mapping):
        raise ValueError(f"its results are {type(results).__name__}, not an object; it is damaged, train again")
    numbers = {name: _number(results, name) for name in _NUMBERS}
    if numbers["trainable"] < 1 or numbers["n_test"] < 1:
        raise ValueError("its results tell of no trained numbers or no test rows; it is damaged, train again")
    size = sum((run.folder / name).stat().st_size for name in _TENSORS if (run.folder / name).is_file())
    if not size:
        raise ValueError(f"it lacks {runs.TENSORS}, what was trained; it is damaged, train again")
    extra_metrics = results.get("extra_metrics")
    return Result(
        run=run,
        name=printable(run.name),
        metric=printable(str(results.get("metric", run.task.metrics[0]))),
        numbers=numbers,
        extra_metrics={printable(name): _number(extra_metrics, name) for name in extra_metrics}
        if isinstance(extra_metrics, Mapping)
        else {},
        zero_shot=_number(results, "zero_shot") if "zero_shot" in results else None,
        selection_warning=printable(str(results.get("selection_warning") or "")),
        warning=printable(str(results.get("warning") or "")),
        size=size,
        curve=tuple(_points(run)),
    )


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its result {name!r} is {value!r}, not a number; it is damaged, train again")
    return float(value)


def _points(run: Run) -> Iterator[Point]:
    """The lines up to the first that is damaged, as `Run.metrics` reads them."""
    last = 0
    for line in run.metrics():
        if not isinstance(line, dict):
            return
        try:
            step, loss = int(_number(line, "step")), _number(line, "loss")
            dev = _number(line, "dev") if "dev" in line else None
        except (ValueError, OverflowError):
            return
        if step <= last:  # not what this library writes
            return
        last = step
        yield Point(step=step, loss=loss, dev=dev)


def printable(text: str) -> str:
    r"""`text` without what would move a terminal's cursor or turn the direction of writing.

    >>> printable("a\x1b[2Jb") == "a" + chr(92) + "x1b[2Jb"
    True
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
