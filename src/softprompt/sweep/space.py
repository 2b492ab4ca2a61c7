"""What a search may choose, and which experiments it chooses for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, final

from softprompt.config import Experiment, TrainingConfig
from softprompt.sweep.settings import as_table, choices, dotted, fitting, hints, refuse_unknown, set_values
from softprompt.sweep.trial import trial_name

Sampler = Literal["random", "tpe"]
"""`random`: independent draws; `tpe`: Optuna's tree of Parzen estimators, which draws where good values were."""


@final
@dataclass(frozen=True, kw_only=True)
class Range:
    """All numbers between two, the ends among them."""

    low: int | float
    """The least."""
    high: int | float
    """The greatest."""
    log: bool = True
    """Equal ratios are equally likely; else equal differences."""
    whole: bool = False
    """Whole numbers alone."""


Space = Mapping[str, Range | tuple[Any, ...]]
"""What is chosen, by dotted name: out of a range, or of a few values."""


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """How values are chosen by the development score."""

    trials: int = 20
    """Trainings for each choice."""
    sampler: Sampler = "tpe"
    """How the next values are drawn."""
    seed: int = 0
    """Of the draws, and of the trainings; what is chosen is then trained with the file's own seeds."""
    prune: bool = True
    """Stop a training whose development score is below the median of those before it, at the same step."""
    warmup: int = 5
    """Trainings that are never stopped early, and whose values are drawn at random."""
    space: Space = field(default_factory=dict, hash=False)
    """What is chosen."""

    def fitting(self, experiment: Experiment) -> Space:
        """What of the space the experiment has: a method without ranks has none to choose."""
        known = {f"training.{name}" for name in hints(TrainingConfig)}
        if experiment.baseline == "none":
            known |= {f"prompt.{name}" for name in hints(type(experiment.prompt))}
        return {name: choice for name, choice in self.space.items() if name in known}

    def cell(self, experiment: Experiment) -> Experiment | None:
        """The experiment with the search's seed, for which values are chosen; none where there is nothing to choose."""
        fitting = self.fitting(experiment)
        least = {name: _ends(choice)[0] for name, choice in fitting.items()}
        return set_values(experiment, {**least, "seed": self.seed}) if fitting else None

    def study(self, cell: Experiment) -> str:
        """The name of the cell's study: another space, sampler or seed is another study, more trials is the same.

        Of the space what the cell has counts: ranks to choose are nothing to a method without.
        """
        rules = asdict(replace(self, space=self.fitting(cell)))
        del rules["trials"]
        digest = hashlib.sha256(json.dumps([cell.hash, rules], sort_keys=True).encode()).hexdigest()
        return f"{trial_name(cell).rpartition('-')[0]}-{digest[:8]}"


def read_search(table: Any, experiments: Sequence[Experiment], source: str) -> Search:
    """The `[search]` table of a sweep's file.

    Raises:
        ValueError: a key or value that cannot be, by name; or an end of a range that an experiment cannot have.
    """
    where = f"{source}: [search]"
    settings = dict(as_table(table, where))
    space = {
        name: _choice(name, value, experiments, f"{source}: [search.space] {name}")
        for name, value in dotted(as_table(settings.pop("space", {}), f"{source}: [search.space]")).items()
    }
    refuse_unknown(settings, [name for name in hints(Search) if name != "space"], where)
    checked = {name: fitting(hints(Search)[name], value, f"{where} {name}") for name, value in settings.items()}
    search = Search(**checked, space=space)
    if not space:
        raise ValueError(f"{where} has nothing to choose; add [search.space] with, say, training.lr = [0.01, 0.1]")
    for name, least in (("trials", 1), ("warmup", 1), ("seed", 0)):
        if getattr(search, name) < least:
            raise ValueError(f"{where} {name} is {getattr(search, name)}; it must be at least {least}")
    for experiment in experiments:
        _refuse_impossible(search, experiment, where)
    return search


def _choice(name: str, value: Any, experiments: Sequence[Experiment], where: str) -> Range | tuple[Any, ...]:
    part, _, key = name.rpartition(".")
    kinds: dict[str, list[type[Any]]] = {
        "training": [TrainingConfig],
        "prompt": [type(one.prompt) for one in experiments if one.baseline == "none"],
    }
    kind = next((kind for kind in kinds.get(part, []) if key in hints(kind)), None)
    if kind is None:
        raise ValueError(
            f"{where} is no setting of training or of a method here; write training.lr, prompt.rank or such"
        )
    if isinstance(value, list):
        return choices({key: value}, kind, f"{where.rpartition(' ')[0]}")[key]
    table = as_table(value, f"{where}, which is neither a list nor a range,")
    refuse_unknown(table, ("low", "high", "log"), where)
    if not {"low", "high"} <= table.keys():
        raise ValueError(f"{where} is {dict(table)!r}; a range has low and high")
    whole = type(fitting(hints(kind)[key], table["low"], f"{where} low")) is int
    ends = {end: fitting(hints(kind)[key], table[end], f"{where} {end}") for end in ("low", "high")}
    log = fitting(bool, table.get("log", True), f"{where} log")
    if not (0 if log else float("-inf")) < ends["low"] < ends["high"]:
        raise ValueError(f"{where} goes from {ends['low']} to {ends['high']}; it must rise{' from above 0' * log}")
    return Range(**ends, log=log, whole=whole)


def _ends(choice: Range | tuple[Any, ...]) -> tuple[Any, ...]:
    return (choice.low, choice.high) if isinstance(choice, Range) else choice


def _refuse_impossible(search: Search, experiment: Experiment, where: str) -> None:
    for name, choice in search.fitting(experiment).items():
        for end in _ends(choice):
            try:
                set_values(experiment, {name: end})
            except ValueError as error:
                raise ValueError(f"{where} could choose {name} = {end}, which cannot be: {error}") from None
