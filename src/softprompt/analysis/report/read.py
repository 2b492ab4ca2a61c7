"""Read the results of runs from their folders, with a reason for each run that is skipped."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt import files, runs
from softprompt.runs import Run

_VALUES = (
    *("dev", "test", "majority", "ci_low", "ci_high", "n_dev", "n_test"),
    *("trainable", "seconds", "steps", "best_step"),
)
_TENSORS = (runs.TENSORS, runs.HEAD, runs.TUNED)
_STUDY = "study.journal"
"""A file in the folder of a sweep's search, beside its trials."""


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """A line of metrics.jsonl."""

    step: int
    loss: float
    dev: float | None
    """The score of an evaluation after this step."""


@final
@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run; scores are fractions."""

    run: Run
    name: str
    """The folder's name, safe to print."""
    metric: str
    values: Mapping[str, float]
    """The record's results: `dev`, `test`, `majority`, `ci_low`, `ci_high`, `n_test`, `trainable` and so on."""
    extra_metrics: Mapping[str, float]
    """The task's further metrics on the test rows."""
    distillation: Mapping[str, Mapping[str, float]]
    """Of a distilled prompt: `kl`, `agreement`, `score` and `tokens` of the teacher, of the prompt and of what it is
    compared with, by name; empty otherwise."""
    zero_shot: float | None
    """The test score of the model without a prompt."""
    selection_warning: str
    """A note that the checkpoint was selected on the test rows; empty where it was not."""
    warning: str
    """Why the test score may mislead; empty where nothing was found."""
    size: int
    """Bytes of the trained tensors."""
    curve: tuple[Point, ...]

    @property
    def seed(self) -> int:
        """The experiment's seed."""
        return self.run.experiment.seed


@final
@dataclass(frozen=True, kw_only=True)
class SkippedRun:
    """A run that is not in the report."""

    folder: str
    reason: str


def find(folders: Sequence[str | Path]) -> list[Path]:
    """Every run's folder among `folders` and below them, once, by path; nothing is searched inside a run.

    The folder of a search is returned instead of its trials, unless it or its parent is among `folders`.

    Raises:
        FileNotFoundError: one of `folders` does not exist.
        NotADirectoryError: one is a file.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        top = Path(folder).expanduser()
        files.check_folder(top, "give runs, or folders that hold runs")
        paths.update(dict.fromkeys(_below(top)))
    # A run that is given under two names (a link, a relative path) is one run.
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def _below(top: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(top):
        is_requested = top in (Path(parent), Path(parent).parent)
        if runs.RECORD in names or (_STUDY in names and not is_requested):
            folders.clear()
            yield Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def read(folders: Sequence[str | Path]) -> tuple[list[Result], list[SkippedRun]]:
    """The finished runs, and the skipped ones with the reason.

    Raises:
        FileNotFoundError: one of `folders` does not exist.
        NotADirectoryError: one is a file.
    """
    results: list[Result] = []
    skipped: list[SkippedRun] = []
    for folder in find(folders):
        if not (folder / runs.RECORD).is_file():
            # Trials have one seed, and some were stopped early: beside the final runs they would look like results.
            reason = "it holds the trials of a search, which selected settings; give this folder itself to see them"
            skipped.append(SkippedRun(folder=printable(str(folder)), reason=reason))
            continue
        try:
            results.append(_result(runs.open_run(folder)))
        except (ValueError, OSError, OverflowError, RecursionError) as error:
            skipped.append(SkippedRun(folder=printable(str(folder)), reason=printable(str(error))))
    return results, skipped


def _result(run: Run) -> Result:
    """The run's results.

    Raises:
        ValueError: it is not finished, or its folder is damaged.
    """
    results = run.record.get("results")
    if results is None:
        raise ValueError(f"it is not finished; resume it with: softprompt train --resume {run.folder}")
    if not isinstance(results, Mapping):
        raise ValueError(f"its results are {type(results).__name__}, not an object; it is damaged, train again")
    values = {name: _number(results, name) for name in _VALUES}
    if values["trainable"] < 1 or values["n_test"] < 1:
        raise ValueError("its results have no trainable parameters or no test rows; it is damaged, train again")
    size = sum((run.folder / name).stat().st_size for name in _TENSORS if (run.folder / name).is_file())
    if not size:
        raise ValueError(f"it lacks {runs.TENSORS}, the trained tensors; it is damaged, train again")
    extra = results.get("extra_metrics")
    result = Result(
        run=run,
        name=printable(run.name),
        metric=printable(str(results.get("metric", run.task.metrics[0]))),
        values=values,
        extra_metrics={printable(name): _number(extra, name) for name in extra} if isinstance(extra, Mapping) else {},
        distillation=_distillation(results.get("distillation")),
        zero_shot=_number(results, "zero_shot") if "zero_shot" in results else None,
        selection_warning=printable(str(results.get("selection_warning") or "")),
        warning=printable(str(results.get("warning") or "")),
        size=size,
        curve=tuple(_points(run)),
    )
    try:
        json.dumps(run.record, allow_nan=False)
    except ValueError:
        raise ValueError("its record has a number that is infinite or NaN; it is damaged, train again") from None
    return result


def _distillation(values: Any) -> dict[str, dict[str, float]]:
    if not isinstance(values, Mapping):
        return {}
    context_tokens, prompt_tokens = _number(values, "context_tokens"), _number(values, "prompt_tokens")
    return {
        printable(name): {
            **{key: _number(model, key) for key in ("kl", "agreement", "score")},
            "tokens": {"teacher": context_tokens, "no_context": 0.0}.get(name, prompt_tokens),
        }
        for name, model in values.items()
        if isinstance(model, Mapping)
    }


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its result {name!r} is {value!r}, not a number; it is damaged, train again")
    return float(value)


def _points(run: Run) -> Iterator[Point]:
    """The lines up to the first damaged one."""
    last = 0
    for line in run.metrics():
        if not isinstance(line, dict):
            return
        try:
            step, loss = int(_number(line, "step")), _number(line, "loss")
            dev = _number(line, "dev") if "dev" in line else None
        except (ValueError, OverflowError):
            return
        if step <= last:  # not written by this library
            return
        last = step
        yield Point(step=step, loss=loss, dev=dev)


def printable(text: str) -> str:
    r"""`text` with control and direction characters escaped, so that it cannot affect a terminal.

    >>> printable("a\x1b[2Jb") == "a" + chr(92) + "x1b[2Jb"
    True
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
