"""A sweep's file, and its experiments: every combination of its lists."""

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt.assets import ASSETS
from softprompt.assets.hub import is_hub_prompt
from softprompt.config import Experiment, TrainingConfig
from softprompt.prompts import METHODS, PromptConfig
from softprompt.runs import prompt_kind
from softprompt.sweep.settings import (
    Choices,
    as_table,
    as_tables,
    check_known,
    choices,
    dotted,
    fitting,
    hints,
    is_table_array,
    set_values,
    split,
)
from softprompt.sweep.space import Search, read_search
from softprompt.tasks import TASKS
from softprompt.tasks.task import suggest
from softprompt.tasks.user import load_task
from softprompt.types import Baseline

_TABLES = ("training", "prompt", "task", "method", "search")
_METHOD_KEYS = ("name", "baseline", "published", "only", "training")


@final
@dataclass(frozen=True)
class Plan:
    """The content of a sweep's file."""

    experiments: tuple[Experiment, ...]
    """All experiments without duplicates, in the file's order."""
    search: Search | None = None
    """The search that chooses further values of the experiments, if there is one."""


@final
@dataclass(frozen=True, kw_only=True)
class _Method:
    """One `[[method]]` table."""

    where: str
    """The table's location in the file, for messages."""
    config: type[PromptConfig] | None
    """None for a baseline."""
    baseline: Baseline = "none"
    published: bool = False
    only: tuple[str, ...] = ()
    """The tasks that the method is limited to; empty: all."""
    choices: Choices


def read(file: str | Path, data: str | Path | None = None) -> Plan:
    """Read a sweep's TOML file; paths in it are relative to its folder.

        backbone = "smollm2-135m"             # any field of Experiment; any value may be a list
        seed = [0, 1, 2]
        [training]                            # any field of TrainingConfig
        shots = 32
        [[task]]                              # or task = "cb" above; `training` and `data` apply to these tasks only
        name = ["cb", "copa:dpt"]
        data = "superglue"
        [[method]]                            # `training`, and any setting of the method itself
        name = "dpt"                          # or baseline = "lora"
        published = true                      # the paper's settings as defaults instead of ours
        rank = [5, 10]

    A table `[prompt]` applies to every method that has its settings, `only = ["cb"]` limits a method to tasks, and
    `[search]` chooses values by the development score.

    Args:
        file: the TOML file.
        data: the folder that relative `data` starts from, instead of the file's own folder.

    Raises:
        FileNotFoundError, NotADirectoryError: the file, its data or an `init_prompt` is not there.
        ValueError: an invalid key or value, by name.
    """
    path = Path(file).expanduser()
    values = _toml(path)
    experiments = expand(values, str(file))
    if data is not None and not any(experiment.data for experiment in experiments):
        raise ValueError(f'{file} sets data for no task, so --data {data} has no effect; add the line data = "."')
    data_folder = path.parent if data is None else Path(data).expanduser()
    experiments = tuple(
        _with_absolute_paths(experiment, path.resolve().parent, data_folder.resolve(), str(file))
        for experiment in experiments
    )
    for task, task_data in dict.fromkeys((experiment.task, experiment.data) for experiment in experiments):
        _check_task(task, task_data, str(file))
    return Plan(experiments, read_search(values["search"], experiments, str(file)) if "search" in values else None)


def expand(values: Mapping[str, Any], source: str) -> tuple[Experiment, ...]:
    """Every combination of the lists in a sweep's tables, without duplicates; the seed varies fastest.

    Args:
        values: the parsed TOML.
        source: the file's name, for messages.

    Raises:
        ValueError: an invalid key or value, by name.

    >>> experiments = expand({"method": [{"name": "plain", "length": [5, 10]}]}, "file")
    >>> [experiment.prompt.length for experiment in experiments]
    [5, 10]
    """
    unique: dict[str, Experiment] = {}
    search = as_table(values.get("search", {}), f"{source}: search")
    searched = dotted(as_table(search.get("space", {}), f"{source}: [search] space"))
    for method, settings in _methods_and_tasks(values, source):
        settings |= _placeholders(searched, method, settings)
        for combination in _combinations(settings):
            experiment = _build(method, combination)
            unique.setdefault(experiment.hash, experiment)
    return tuple(unique.values())


def _placeholders(searched: Mapping[str, Any], method: _Method, settings: Choices) -> Choices:
    """The first value of each of the method's searched settings: until one is chosen, they too must fit together."""
    first_values = Choices()
    for name, dimension in searched.items():
        part, _, key = name.rpartition(".")
        kind = {"training": TrainingConfig, "prompt": method.config}.get(part)
        if isinstance(dimension, Mapping):
            first = dimension.get("low")
        else:
            first = dimension[0] if isinstance(dimension, list) else None
        if kind is None or key not in hints(kind) or first is None:
            continue  # `read_search` reports it
        if len(settings.get(name, ())) > 1:
            raise ValueError(f"{method.where} has a list of {name}, which [search.space] chooses; leave one out")
        first_values |= choices({key: first}, kind, f"{method.where} [search.space]", f"{part}.")
    return first_values


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a sweep's .toml file")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}; correct it there") from None


def _methods_and_tasks(values: Mapping[str, Any], source: str) -> Iterator[tuple[_Method, Choices]]:
    """Every method with each `[[task]]` table, and the settings that apply to the two."""
    tables = [name for name in _TABLES if name != "task" or is_table_array(values.get("task"))]
    top_level = {key: value for key, value in values.items() if key not in tables}
    check_known(top_level, [*hints(Experiment), *_TABLES], source)
    common = choices(top_level, Experiment, source + ":")
    common |= choices(values.get("training", {}), TrainingConfig, f"{source}: [training]", "training.")
    tasks = _tasks(values, source) if "task" in tables and "task" in values else [Choices()]
    methods = list(_methods(values, source))
    all_tasks = {name for task in tasks for name in (common | task).get("task", (Experiment().task,))}
    for method in methods:
        if unknown := sorted(set(method.only) - all_tasks):
            raise ValueError(
                f"{method.where} is only for {unknown[0]!r}, not a task of this file; {suggest(unknown[0], all_tasks)}"
            )
    for task, method in itertools.product(tasks, methods):
        if both := sorted(set(task) & set(method.choices)):
            raise ValueError(f"{method.where} and a [[task]] both set {both[0]}; leave one out")
        settings = common | task | method.choices
        names = settings.get("task", (Experiment().task,))
        if method.only:
            names = tuple(name for name in names if name in method.only)
        if names:
            yield method, settings | {"task": names}


def _tasks(values: Mapping[str, Any], source: str) -> list[Choices]:
    tasks = []
    for where, table in as_tables(values["task"], "task", source):
        check_known(table, ("name", "data", "training"), where)
        if "name" not in table:
            raise ValueError(f'{where} has no name; add the line name = "cb", or the name of another task')
        fields = {"task" if key == "name" else key: value for key, value in table.items() if key != "training"}
        settings = choices(fields, Experiment, where)
        tasks.append(settings | choices(table.get("training", {}), TrainingConfig, f"{where} training", "training."))
    return tasks


def _methods(values: Mapping[str, Any], source: str) -> Iterator[_Method]:
    shared = as_table(values.get("prompt", {}), f"{source}: prompt")
    default = [(source, {"name": Experiment().prompt.name})]
    tables = as_tables(values["method"], "method", source) if "method" in values else default
    used = {name for _, table in tables if (config := METHODS.get(str(table.get("name")))) for name in hints(config)}
    check_known(shared, used, f"{source}: [prompt]")
    for where, table in tables:
        if ("name" in table) == ("baseline" in table):
            raise ValueError(f'{where} must have either a name ("dpt") or a baseline ("lora")')
        training = choices(table.get("training", {}), TrainingConfig, f"{where} training", "training.")
        settings = {key: value for key, value in table.items() if key not in _METHOD_KEYS}
        only = _only_tasks(table.get("only", []), where)
        if "baseline" in table:
            check_known(table, ("baseline", "only", "training"), where)
            baseline = fitting(Baseline, table["baseline"], f"{where} baseline")
            if baseline == "none":
                raise ValueError(f"{where} baseline is 'none'; leave the table out")
            yield _Method(where=where, config=None, baseline=baseline, only=only, choices=training)
            continue
        if (name := table["name"]) not in METHODS:
            raise ValueError(f"{where} name is {name!r}, which is not a method; {suggest(str(name), METHODS)}")
        config = METHODS[name]
        check_known(table, [*hints(config), *_METHOD_KEYS], where)
        applicable = {key: value for key, value in shared.items() if key in hints(config)}
        prompt = choices(applicable, config, f"{source}: [prompt]", "prompt.")
        prompt |= choices(settings, config, where, "prompt.")
        published = fitting(bool, table.get("published", False), f"{where} published")
        yield _Method(where=where, config=config, published=published, only=only, choices=training | prompt)


def _only_tasks(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where} only is {value!r}; it must be a list of this file's tasks")
    return tuple(value)


def _combinations(settings: Choices) -> Iterator[dict[str, Any]]:
    names = sorted(settings, key=lambda name: (name != "task", name == "seed"))
    for values in itertools.product(*(settings[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _build(method: _Method, values: Mapping[str, Any]) -> Experiment:
    prompt = Experiment().prompt
    try:
        if method.config is not None:
            # Built with its values at once: they need not fit together with the defaults.
            fields = split(values)["prompt"]
            prompt = method.config.published().replace(**fields) if method.published else method.config(**fields)
        others = {name: value for name, value in values.items() if not name.startswith("prompt.")}
        return set_values(Experiment(prompt=prompt, baseline=method.baseline), others)
    except ValueError as error:
        raise ValueError(f"{method.where}: {error}") from None


def _with_absolute_paths(experiment: Experiment, folder: Path, data_folder: Path, source: str) -> Experiment:
    """The experiment with absolute paths: the file's paths start from its `folder`, its data from `data_folder`."""
    changes: dict[str, Any] = {}
    for name in ("backbone", "task", "context", "init_prompt"):
        value = getattr(experiment, name)
        if value and value not in ASSETS and value.partition(":")[0] not in TASKS and (folder / value).exists():
            changes[name] = str((folder / value).resolve())
    if experiment.context is not None and "context" not in changes:
        raise FileNotFoundError(f"{source}: context is {experiment.context!r}, but {folder} has no such file")
    init_prompt = changes.get("init_prompt", experiment.init_prompt)
    if init_prompt is not None and not is_hub_prompt(init_prompt):
        try:
            prompt_kind(Path(init_prompt).expanduser())
        except OSError as error:
            raise type(error)(f"{source}: init_prompt is {experiment.init_prompt!r}: {error}") from None
    if experiment.data is not None:
        data = data_folder / Path(experiment.data).expanduser()
        if not data.exists():
            raise FileNotFoundError(f"{source}: data is {experiment.data!r}, but {data} does not exist; see --data")
        changes["data"] = str(data.resolve())
    return experiment.replace(**changes).with_absolute_paths()


def _check_task(task: str, data: str | None, source: str) -> None:
    try:
        load_task(task, data)
    except ValueError as error:
        raise ValueError(f"{source}: task is {task!r}: {error}") from None
