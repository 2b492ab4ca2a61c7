"""Group runs that differ only in the seed."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from softprompt.analysis.report.read import Result, SkippedRun, printable
from softprompt.analysis.report.statistics import Interval, Spread
from softprompt.config import MEMORY_OPTIONS, Experiment, TrainingConfig
from softprompt.runs import Run
from softprompt.tasks import TASKS, Task

Settings = Mapping[str, Any]
"""Names like `lr` or `rank`, and plain values."""


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one experiment that differ only in the seed, ordered by seed."""

    method: str
    settings: Settings
    """The experiment without the method, the task, its rows and the seed."""
    task_settings: Settings
    """The task with its own settings, its wording, its rows and its protocol."""
    results: tuple[Result, ...]

    def spread(self, name: str) -> Spread:
        """One of the results' values, over seeds."""
        return Spread(tuple(float(result.values[name]) for result in self.results))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The runs' seeds, ascending."""
        return tuple(result.seed for result in self.results)

    @property
    def metric(self) -> str:
        """The task's first metric."""
        return self.results[0].metric

    @property
    def rows_interval(self) -> Interval:
        """The uncertainty from the choice of test rows: the ends of the runs' intervals, each averaged over seeds."""
        return Interval(low=self.spread("ci_low").mean, high=self.spread("ci_high").mean)

    @property
    def against_majority(self) -> str:
        """Whether the score is `above`, `within` or `below` the majority answer's, by both intervals."""
        intervals = [interval for interval in (self.rows_interval, self.spread("test").interval) if interval]
        majority = self.spread("majority").mean
        if majority > max(interval.high for interval in intervals):
            return "below"
        return "within" if majority >= min(interval.low for interval in intervals) else "above"

    @property
    def selection_warning(self) -> str:
        """The first run's warning that development and test rows are the same; empty where none has it."""
        return next((result.selection_warning for result in self.results if result.selection_warning), "")

    @property
    def zero_shot(self) -> float | None:
        """The zero-shot score, averaged over the seeds that have one."""
        scores = [result.zero_shot for result in self.results if result.zero_shot is not None]
        return statistics.fmean(scores) if scores else None


def group(results: Iterable[Result]) -> tuple[list[Group], list[SkippedRun]]:
    """Group by everything in the experiment but its seed, and skip second runs of the same seed.

    A backbone is identified by its weights and the dtype it computed in, not by the path it was loaded from.
    """
    members: dict[str, dict[int, Result]] = {}
    keys: dict[str, tuple[str, Settings, Settings]] = {}
    skipped: list[SkippedRun] = []
    backbone_names: dict[str, str] = {}
    for result in sorted(results, key=lambda result: (str(result.run.record.get("created", "")), result.name)):
        settings = _settings(result)
        weights = str(result.run.record["backbone"]["hash"])
        settings["backbone"] = backbone_names.setdefault(weights, settings["backbone"])
        parts = (result.run.experiment.method, settings, _task_settings(result))
        key = json.dumps(parts, sort_keys=True)
        keys[key] = parts
        seeds = members.setdefault(key, {})
        if (first := seeds.setdefault(result.seed, result)) is not result:
            reason = f"it has the same experiment and seed as {first.name}, the older run, which is reported"
            skipped.append(SkippedRun(folder=printable(str(result.run.folder)), reason=reason))
    groups = [
        Group(
            method=keys[key][0],
            settings=keys[key][1],
            task_settings=keys[key][2],
            results=tuple(seeds[seed] for seed in sorted(seeds)),
        )
        for key, seeds in members.items()
    ]
    return groups, skipped


def method_settings(experiment: Experiment) -> dict[str, Any]:
    """The method's own settings, prefixed with `prompt.` where training has one of that name; empty for a baseline."""
    if experiment.baseline != "none":
        return {}
    training_names = {field.name for field in dataclasses.fields(TrainingConfig)}
    values = {name: value for name, value in experiment.prompt.to_json().items() if name != "method"}
    return {f"prompt.{name}" if name in training_names else name: value for name, value in values.items()}


_HANDLED_FIELDS = {"task", "data", "protocol", "prompt", "baseline", "training", "seed", "backbone", "dtype"}
"""Fields of an experiment that a group's method, settings and task settings, or the run's record, cover otherwise."""
SETTING_FIELDS = tuple(field.name for field in dataclasses.fields(Experiment) if field.name not in _HANDLED_FIELDS)
"""All other fields, listed by exclusion so that runs which differ in a field added later are never averaged."""


def _settings(result: Result) -> dict[str, Any]:
    experiment, backbone = result.run.experiment, result.run.record["backbone"]
    settings = {**method_settings(experiment), **dataclasses.asdict(experiment.training)}
    for name in ("zero_shot", *MEMORY_OPTIONS):  # they do not change the trained prompt
        del settings[name]
    return {
        # 1 and 1.0 are one value, whichever was written.
        **{name: _integral(value) for name, value in settings.items()},
        **{name: getattr(experiment, name) for name in SETTING_FIELDS},
        **_contents(result.run),
        "backbone": printable(str(backbone["base"])),
        "weights": str(backbone["hash"])[:12],
        "dtype": str(backbone["dtype"]),
    }


CONTENTS = {"context_hash": "context_file", "init_prompt_hash": "init_prompt"}
"""Settings that say what a file was that another one names by its path, each with its key in a run's record."""


def _contents(run: Run) -> dict[str, str | None]:
    """Runs from other contents of a file are never averaged; demonstrations follow from the rows and the seed."""
    hashes = {setting: run.record.get(name) for setting, name in CONTENTS.items()}
    return {setting: None if value is None else str(value)[:8] for setting, value in hashes.items()}


_WORDING_FIELDS = ("template", "messages", "assistant_turns", "image", "label", "label_words", "target", "metrics")
_HANDLED_TASK_FIELDS = {"name", "description", "templates", "files"}
"""Fields of a task that do not matter (other wordings do not), or that `task` and `data` cover; all others count."""


def _task_settings(result: Result) -> dict[str, Any]:
    experiment, task = result.run.experiment, result.run.task
    is_builtin = experiment.task.partition(":")[0] in TASKS
    fields = {name: value for name, value in task.to_json().items() if name not in _HANDLED_TASK_FIELDS}
    wording = {name: fields.pop(name) for name in _WORDING_FIELDS}
    return {
        "task": printable(experiment.task if is_builtin else task.name),
        "protocol": experiment.protocol,
        "metric": result.metric,
        "data": _data(experiment, task),
        **{f"task.{name}": value for name, value in fields.items()},
        "wording": json.dumps(wording),  # the order of the label words is the order of the classes
        "rows": str(result.run.record["data"]["full"])[:12],
    }


def _data(experiment: Experiment, task: Task) -> str | None:
    """Where the rows are read from: two tasks of one name and wording may have different files."""
    override = {} if experiment.data is None else {"train": experiment.data}
    return ", ".join(dict.fromkeys({**task.files, **override}.values())) or None


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
