"""A sweep's file, and the experiments that it says: every combination of its lists."""

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt.assets import ASSETS
from softprompt.config import Experiment, TrainingConfig
from softprompt.prompts import METHODS, PromptConfig
from softprompt.sweep.settings import (
    Choices,
    as_table,
    as_tables,
    choices,
    dotted,
    fitting,
    hints,
    refuse_unknown,
    set_values,
    split,
)
from softprompt.sweep.space import Search, read_search
from softprompt.tasks import TASKS, load_task
from softprompt.tasks.task import suggest
from softprompt.types import Baseline

_TABLES = ("training", "prompt", "task", "method", "search")
_METHOD_KEYS = ("name", "baseline", "published", "only", "training")


@final
@dataclass(frozen=True)
class Plan:
    """What a sweep's file says."""

    experiments: tuple[Experiment, ...]
    """Each once, in the file's order."""
    search: Search | None = None
    """What is still to be chosen in each of them; none: nothing."""


@final
@dataclass(frozen=True, kw_only=True)
class _Method:
    """One `[[method]]` table."""

    where: str
    config: type[PromptConfig] | None
    """None for a baseline."""
    baseline: Baseline = "none"
    published: bool = False
    only: tuple[str, ...] = ()
    """The tasks that it is for; empty: all."""
    choices: Choices


def read(file: str | Path, data: str | Path | None = None) -> Plan:
    """The plan in a sweep's TOML file; paths in it are relative to its folder.

        backbone = "smollm2-135m"             # any field of Experiment; any value may be a list
        seed = [0, 1, 2]
        [training]                            # any field of Training
        shots = 32
        [[task]]                              # or task = "cb" above; `training` and `data` are for this task alone
        name = ["cb", "copa:dpt"]
        data = "superglue"
        [[method]]                            # `training`, and any setting of the method
        name = "dpt"                          # or baseline = "lora"
        published = true                      # the paper's settings instead of ours, where none is given
        rank = [5, 10]

    A table `[prompt]` is for every method that has its settings, `only = ["cb"]` limits a method to tasks, and
    `[search]` leaves values to be chosen by the development score.

    Args:
        file: the TOML file.
        data: the folder in which relative `data` begins, in place of the file's own.

    Raises:
        FileNotFoundError: no such file, or no such data.
        ValueError: a key or value that cannot be, by name.
    """
    path = Path(file).expanduser()
    values = _toml(path)
    experiments = expand(values, str(file))
    if data is not None and not any(one.data for one in experiments):
        raise ValueError(f'{file} says data of no task, so --data {data} begins nothing; add the line data = "."')
    begins = path.parent if data is None else Path(data).expanduser()
    located = tuple(_located(one, path.resolve().parent, begins.resolve(), str(file)) for one in experiments)
    for task, where in dict.fromkeys((one.task, one.data) for one in located):
        _refuse_unknown_task(task, where, str(file))
    return Plan(located, read_search(values["search"], located, str(file)) if "search" in values else None)


def expand(values: Mapping[str, Any], source: str) -> tuple[Experiment, ...]:
    """Every combination of the lists in a sweep's tables, each experiment once; the seed varies fastest.

    Args:
        values: as TOML gives them.
        source: what to call the file in a message.

    Raises:
        ValueError: a key or value that cannot be, by name.

    >>> [one.prompt.length for one in expand({"method": [{"name": "plain", "length": [5, 10]}]}, "file")]
    [5, 10]
    """
    unique: dict[str, Experiment] = {}
    search = as_table(values.get("search", {}), f"{source}: search")
    searched = dotted(as_table(search.get("space", {}), f"{source}: [search] space"))
    for method, listed in _combined(values, source):
        listed |= _first(searched, method, listed)
        for settings in _product(listed):
            experiment = _build(method, settings)
            unique.setdefault(experiment.hash, experiment)
    return tuple(unique.values())


def _first(searched: Mapping[str, Any], method: _Method, listed: Choices) -> Choices:
    """A value for each setting of the method that a search will choose: what holds until then has to fit together."""
    found = Choices()
    for name, choice in searched.items():
        part, _, key = name.rpartition(".")
        kind = {"training": TrainingConfig, "prompt": method.config}.get(part)
        first = choice.get("low") if isinstance(choice, Mapping) else choice[0] if isinstance(choice, list) else None
        if kind is None or key not in hints(kind) or first is None:
            continue  # said by name where the space is read
        if len(listed.get(name, ())) > 1:
            raise ValueError(f"{method.where} has a list of {name}, which [search.space] chooses; leave one out")
        found |= choices({key: first}, kind, f"{method.where} [search.space]", f"{part}.")
    return found


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a sweep's .toml file")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}; correct it there") from None


def _combined(values: Mapping[str, Any], source: str) -> Iterator[tuple[_Method, Choices]]:
    """Every method with every task that it is for, and the choices that hold there."""
    tables = [name for name in _TABLES if name != "task" or _all_tables(values.get("task"))]
    own = {key: value for key, value in values.items() if key not in tables}
    refuse_unknown(own, [*hints(Experiment), *_TABLES], source)
    top = choices(own, Experiment, source + ":")
    top |= choices(values.get("training", {}), TrainingConfig, f"{source}: [training]", "training.")
    tasks = _tasks(values, source) if "task" in tables and "task" in values else [Choices()]
    methods = list(_methods(values, source))
    names = {name for task in tasks for name in (top | task).get("task", (Experiment().task,))}
    for method in methods:
        if unknown := sorted(set(method.only) - names):
            raise ValueError(
                f"{method.where} is only for {unknown[0]!r}, no task of this file; {suggest(unknown[0], names)}"
            )
    for task, method in itertools.product(tasks, methods):
        if both := sorted(set(task) & set(method.choices)):
            raise ValueError(f"{method.where} and a [[task]] both set {both[0]}; leave one out")
        listed = top | task | method.choices
        named = listed.get("task", (Experiment().task,))
        if method.only:
            named = tuple(name for name in named if name in method.only)
        if named:
            yield method, listed | {"task": named}


def _all_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _tasks(values: Mapping[str, Any], source: str) -> list[Choices]:
    found = []
    for where, table in as_tables(values["task"], "task", source):
        refuse_unknown(table, ("name", "data", "training"), where)
        if "name" not in table:
            raise ValueError(f'{where} has no name; add the line name = "cb", or that of another task')
        settings = {"task" if key == "name" else key: value for key, value in table.items() if key != "training"}
        own = choices(settings, Experiment, where)
        found.append(own | choices(table.get("training", {}), TrainingConfig, f"{where} training", "training."))
    return found


def _methods(values: Mapping[str, Any], source: str) -> Iterator[_Method]:
    shared = as_table(values.get("prompt", {}), f"{source}: prompt")
    default = [(source, {"name": Experiment().prompt.name})]
    tables = as_tables(values["method"], "method", source) if "method" in values else default
    used = {name for _, table in tables if (config := METHODS.get(str(table.get("name")))) for name in hints(config)}
    refuse_unknown(shared, used, f"{source}: [prompt]")
    for where, table in tables:
        if ("name" in table) == ("baseline" in table):
            raise ValueError(f'{where} must have either a name ("dpt") or a baseline ("lora"), and has not')
        training = choices(table.get("training", {}), TrainingConfig, f"{where} training", "training.")
        settings = {key: value for key, value in table.items() if key not in _METHOD_KEYS}
        only = _only_tasks(table.get("only", []), where)
        if "baseline" in table:
            refuse_unknown(table, ("baseline", "only", "training"), where)
            baseline = fitting(Baseline, table["baseline"], f"{where} baseline")
            if baseline == "none":
                raise ValueError(f"{where} baseline is 'none'; leave the table out")
            yield _Method(where=where, config=None, baseline=baseline, only=only, choices=training)
            continue
        if (name := table["name"]) not in METHODS:
            raise ValueError(f"{where} name is {name!r}, which is no method; {suggest(str(name), METHODS)}")
        config = METHODS[name]
        refuse_unknown(table, [*hints(config), *_METHOD_KEYS], where)
        mine = {key: value for key, value in shared.items() if key in hints(config)}
        prompt = choices(mine, config, f"{source}: [prompt]", "prompt.") | choices(settings, config, where, "prompt.")
        published = fitting(bool, table.get("published", False), f"{where} published")
        yield _Method(where=where, config=config, published=published, only=only, choices=training | prompt)


def _only_tasks(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{where} only is {value!r}; it must be a list of this file's tasks")
    return tuple(value)


def _product(listed: Choices) -> Iterator[dict[str, Any]]:
    names = sorted(listed, key=lambda name: (name != "task", name == "seed"))
    for values in itertools.product(*(listed[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _build(method: _Method, settings: Mapping[str, Any]) -> Experiment:
    prompt = Experiment().prompt
    try:
        if method.config is not None:
            # Not built first and changed after: the defaults need not fit together with what is given.
            given = split(settings)["prompt"]
            prompt = method.config.published().replace(**given) if method.published else method.config(**given)
        rest = {name: value for name, value in settings.items() if not name.startswith("prompt.")}
        return set_values(Experiment(prompt=prompt, baseline=method.baseline), rest)
    except ValueError as error:
        raise ValueError(f"{method.where}: {error}") from None


def _located(experiment: Experiment, folder: Path, begins: Path, source: str) -> Experiment:
    """The same with absolute paths: the file's paths begin in its `folder`, its data in `begins`."""
    changes: dict[str, Any] = {}
    for name in ("backbone", "task", "init_prompt"):
        value = getattr(experiment, name)
        if value and value not in ASSETS and value.partition(":")[0] not in TASKS and (folder / value).exists():
            changes[name] = str((folder / value).resolve())
    if experiment.data is not None:
        place = begins / Path(experiment.data).expanduser()
        if not place.exists():
            raise FileNotFoundError(f"{source}: data is {experiment.data!r}, and there is no {place}; see --data")
        changes["data"] = str(place.resolve())
    return experiment.replace(**changes).located()


def _refuse_unknown_task(task: str, data: str | None, source: str) -> None:
    try:
        load_task(task, data)
    except ValueError as error:
        raise ValueError(f"{source}: task is {task!r}: {error}") from None
