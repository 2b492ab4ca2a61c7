"""Runs that differ in nothing but the seed, and what they say together."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from softprompt.analysis.report.read import Result, SkippedRun, printable
from softprompt.config import MEMORY_OPTIONS, Experiment, TrainingConfig
from softprompt.tasks import TASKS, Task

Settings = Mapping[str, Any]
"""Names like `lr` or `rank`, and plain values."""


@final
@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval, as fractions."""

    low: float
    high: float


@final
@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample's standard deviation; none of a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean, `mean ± t(0.975, k - 1) s / sqrt(k)`; none where nothing spreads.

        A single seed has no spread, and neither have equal scores: with few rows or few seeds these are common, and an
        interval of no width would say that no other seed could come to anything else.

        >>> interval = Spread((0.5, 0.6, 0.7)).interval
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.352, 0.848)
        """
        if not (self.deviation or 0) > 1e-12:  # differences of equal scores have their roundings
            return None
        from scipy.stats import t

        count = len(self.values)
        half = float(t.ppf(0.975, count - 1)) * statistics.stdev(self.values) / math.sqrt(count)
        return Interval(low=self.mean - half, high=self.mean + half)


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one experiment that differ only in the seed, by seed."""

    method: str
    settings: Settings
    """All of the experiment but the method, the task, its rows and the seed."""
    column: Settings
    """The task, its wording, its rows and its protocol."""
    results: tuple[Result, ...]

    def spread(self, name: str) -> Spread:
        """Of one of the results' numbers."""
        return Spread(tuple(float(result.numbers[name]) for result in self.results))

    @property
    def seeds(self) -> tuple[int, ...]:
        """In order."""
        return tuple(result.seed for result in self.results)

    @property
    def metric(self) -> str:
        """The task's first metric."""
        return self.results[0].metric

    @property
    def rows_interval(self) -> Interval:
        """What drawing other test rows would change: the ends of the runs' own intervals, each a mean over seeds."""
        return Interval(low=self.spread("ci_low").mean, high=self.spread("ci_high").mean)

    @property
    def standing(self) -> str:
        """Against the majority answer, by both intervals: `above`, `within` or `below` them."""
        intervals = [interval for interval in (self.rows_interval, self.spread("test").interval) if interval]
        majority = self.spread("majority").mean
        if majority > max(interval.high for interval in intervals):
            return "below"
        return "within" if majority >= min(interval.low for interval in intervals) else "above"

    @property
    def selection_warning(self) -> str:
        """What the runs' records warn of."""
        return next((result.selection_warning for result in self.results if result.selection_warning), "")

    @property
    def zero_shot(self) -> float | None:
        """The model's score without a prompt, a mean over those seeds that have it."""
        known = [result.zero_shot for result in self.results if result.zero_shot is not None]
        return statistics.fmean(known) if known else None


def group(results: Iterable[Result]) -> tuple[list[Group], list[SkippedRun]]:
    """Groups by all of the experiment but its seed, and the runs left out as second runs of the same seed.

    The backbone counts by its weights and the type it computed in, not by the place it was loaded from.
    """
    members: dict[str, dict[int, Result]] = {}
    keys: dict[str, tuple[str, Settings, Settings]] = {}
    left_out: list[SkippedRun] = []
    names: dict[str, str] = {}
    for result in sorted(results, key=lambda result: (str(result.run.record.get("created", "")), result.name)):
        settings = _settings(result)
        settings["backbone"] = names.setdefault(str(result.run.record["backbone"]["hash"]), settings["backbone"])
        whole = (result.run.experiment.method, settings, _column(result))
        key = json.dumps(whole, sort_keys=True)
        keys[key] = whole
        seeds = members.setdefault(key, {})
        if (first := seeds.setdefault(result.seed, result)) is not result:
            reason = f"the same experiment and seed as {first.name}, which is older and was taken"
            left_out.append(SkippedRun(folder=printable(str(result.run.folder)), reason=reason))
    groups = [
        Group(
            method=keys[key][0],
            settings=keys[key][1],
            column=keys[key][2],
            results=tuple(seeds[seed] for seed in sorted(seeds)),
        )
        for key, seeds in members.items()
    ]
    return groups, left_out


def own_settings(experiment: Experiment) -> dict[str, Any]:
    """The method's own settings; a name that the training has too is told apart. A baseline has none."""
    if experiment.baseline != "none":
        return {}
    trainings = {field.name for field in dataclasses.fields(TrainingConfig)}
    values = {name: value for name, value in experiment.prompt.to_json().items() if name != "method"}
    return {f"prompt.{name}" if name in trainings else name: value for name, value in values.items()}


_TOLD = {"task", "data", "protocol", "prompt", "baseline", "training", "seed", "backbone", "dtype"}
"""Fields of an experiment that a group's method, settings and column, or the run's record, tell in their own way."""
WAYS = tuple(field.name for field in dataclasses.fields(Experiment) if field.name not in _TOLD)
"""The other fields. Walked, so that one that is added to an experiment cannot be averaged over."""


def _settings(result: Result) -> dict[str, Any]:
    experiment, backbone = result.run.experiment, result.run.record["backbone"]
    settings = {**own_settings(experiment), **dataclasses.asdict(experiment.training)}
    for name in ("zero_shot", *MEMORY_OPTIONS):  # what changes nothing of what comes of the training
        del settings[name]
    return {
        # 1 and 1.0 are one value, whichever was written.
        **{name: _whole(value) for name, value in settings.items()},
        **{name: getattr(experiment, name) for name in WAYS},
        "backbone": printable(str(backbone["base"])),
        "weights": str(backbone["hash"])[:12],
        "dtype": str(backbone["dtype"]),
    }


def _column(result: Result) -> dict[str, Any]:
    experiment, task = result.run.experiment, result.run.task
    known = experiment.task.partition(":")[0] in TASKS
    saying = ("template", "label_words", "label", "target", "question", "metrics")
    return {
        "task": printable(experiment.task if known else task.name),
        "protocol": experiment.protocol,
        "data": _data(experiment, task),
        "metric": result.metric,
        "wording": json.dumps(
            {name: value for name, value in task.to_json().items() if name in saying}, sort_keys=True
        ),
    }


def _data(experiment: Experiment, task: Task) -> str | None:
    """Where the rows are said to lie: two tasks of one name and wording may have files of their own."""
    given = {} if experiment.data is None else {"train": experiment.data}
    return ", ".join(dict.fromkeys({**task.files, **given}.values())) or None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
