"""The search space, and the experiments that a search is run for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, final

from softprompt.config import Experiment, TrainingConfig
from softprompt.sweep.settings import as_table, check_known, choices, dotted, fitting, hints, set_values
from softprompt.sweep.trial import trial_name

Sampler = Literal["random", "tpe"]
"""`random`: independent draws; `tpe`: Optuna's tree-structured Parzen estimator, which draws near good values."""


@final
@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers from `low` to `high`, inclusive."""

    low: int | float
    high: int | float
    log: bool = True
    """Sample uniformly in the logarithm; otherwise uniformly in the value."""
    integer: bool = False
    """Only integers."""


Space = Mapping[str, Range | tuple[Any, ...]]
"""The dimensions of a search by dotted name: each a range, or a list of values."""


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """The `[search]` table of a sweep: how values are chosen by the development score."""

    trials: int = 20
    """Trials per study."""
    sampler: Sampler = "tpe"
    """How the values of the next trial are sampled."""
    seed: int = 0
    """Seed of the sampler and of the trials; the chosen values are then trained with the file's own seeds."""
    prune: bool = True
    """Stop a trial whose best development score so far is below the median score, at the same step, of the trials that
    were trained to their end."""
    warmup: int = 5
    """Number of first trials whose values are sampled at random; none is pruned before as many were trained to their
    end."""
    space: Space = field(default_factory=dict, hash=False)
    """What is searched."""

    def fitting(self, experiment: Experiment) -> Space:
        """The dimensions that the experiment has: a method without a rank has no rank to choose."""
        known = {f"training.{name}" for name in hints(TrainingConfig)}
        if experiment.baseline == "none":
            known |= {f"prompt.{name}" for name in hints(type(experiment.prompt))}
        return {name: dimension for name, dimension in self.space.items() if name in known}

    def cell(self, experiment: Experiment) -> Experiment | None:
        """The experiment that a study is run for, with the search's seed; None if it has nothing to choose."""
        fitting = self.fitting(experiment)
        first = {name: _bounds(dimension)[0] for name, dimension in fitting.items()}
        return set_values(experiment, {**first, "seed": self.seed}) if fitting else None

    def study(self, cell: Experiment) -> str:
        """The name of the cell's study, which depends on sampler, seed and the cell's dimensions, not on `trials`."""
        settings = asdict(replace(self, space=self.fitting(cell)))
        del settings["trials"]
        digest = hashlib.sha256(json.dumps([cell.hash, settings], sort_keys=True).encode()).hexdigest()
        return f"{trial_name(cell).rpartition('-')[0]}-{digest[:8]}"


def read_search(table: Any, experiments: Sequence[Experiment], source: str) -> Search:
    """Read the `[search]` table of a sweep's file.

    Raises:
        ValueError: an invalid key or value, by name; or a bound of a range that an experiment cannot have.
    """
    where = f"{source}: [search]"
    settings = dict(as_table(table, where))
    space = {
        name: _dimension(name, value, experiments, f"{source}: [search.space] {name}")
        for name, value in dotted(as_table(settings.pop("space", {}), f"{source}: [search.space]")).items()
    }
    check_known(settings, [name for name in hints(Search) if name != "space"], where)
    checked = {name: fitting(hints(Search)[name], value, f"{where} {name}") for name, value in settings.items()}
    search = Search(**checked, space=space)
    if not space:
        raise ValueError(f"{where} has nothing to choose; add [search.space] with, say, training.lr = [0.01, 0.1]")
    for name, minimum in (("trials", 1), ("warmup", 1), ("seed", 0)):
        if getattr(search, name) < minimum:
            raise ValueError(f"{where} {name} is {getattr(search, name)}; it must be at least {minimum}")
    for experiment in experiments:
        _check_bounds(search, experiment, where)
    return search


def _dimension(name: str, value: Any, experiments: Sequence[Experiment], where: str) -> Range | tuple[Any, ...]:
    part, _, key = name.rpartition(".")
    kinds: dict[str, list[type[Any]]] = {
        "training": [TrainingConfig],
        "prompt": [type(experiment.prompt) for experiment in experiments if experiment.baseline == "none"],
    }
    kind = next((kind for kind in kinds.get(part, []) if key in hints(kind)), None)
    if kind is None:
        raise ValueError(
            f"{where} is not a setting of training or of a method in this file; write, for example, training.lr"
        )
    if isinstance(value, list):
        return choices({key: value}, kind, where.rpartition(" ")[0])[key]
    table = as_table(value, f"{where}, which is neither a list nor a range,")
    check_known(table, ("low", "high", "log"), where)
    if not {"low", "high"} <= table.keys():
        raise ValueError(f"{where} is {dict(table)!r}; a range has low and high")
    low, high = (fitting(hints(kind)[key], table[bound], f"{where} {bound}") for bound in ("low", "high"))
    log = fitting(bool, table.get("log", True), f"{where} log")
    if not (0 if log else float("-inf")) < low < high:
        raise ValueError(f"{where} goes from {low} to {high}; it must rise{' from above 0' * log}")
    return Range(low=low, high=high, log=log, integer=type(low) is int)


def _bounds(dimension: Range | tuple[Any, ...]) -> tuple[Any, ...]:
    """The ends of a range, or every value of a list."""
    return (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension


def _check_bounds(search: Search, experiment: Experiment, where: str) -> None:
    for name, dimension in search.fitting(experiment).items():
        for value in _bounds(dimension):
            try:
                set_values(experiment, {name: value})
            except ValueError as error:
                raise ValueError(f"{where} could choose {name} = {value}, which is invalid: {error}") from None
