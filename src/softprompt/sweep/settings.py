"""The settings in a sweep's file, checked against the dataclass fields that they set."""

import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softprompt.config import Experiment, TrainingConfig
from softprompt.tasks.task import suggest

Choices = dict[str, tuple[Any, ...]]
"""The values of each setting by dotted name (`seed`, `training.lr`, `prompt.rank`): one, or several from a list."""

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def hints(kind: type[Any]) -> dict[str, Any]:
    """The fields of a config class with their types; of `Experiment`, those with plain values."""
    known = get_type_hints(kind)
    if kind is Experiment:
        return {name: hint for name, hint in known.items() if name not in ("prompt", "training", "baseline")}
    fields = kind.__dataclass_fields__
    return {name: hint for name, hint in known.items() if name in fields}


def choices(table: Any, kind: type[Any], where: str, prefix: str = "") -> Choices:
    """The values of the table's settings, which are fields of `kind`, under names that begin with `prefix`.

    Args:
        where: the table's location in the file, for the messages.

    Raises:
        ValueError: an unknown setting, a value of the wrong type, an empty list, or a repeated value.
    """
    known, settings = hints(kind), Choices()
    for key, value in as_table(table, where).items():
        if key not in known:
            raise ValueError(f"{where} has the unknown setting {key!r}; {suggest(key, known)}")
        items = value if type(value) is list else [value]
        values = [fitting(known[key], item, f"{where} {key}") for item in items]
        if not values:
            raise ValueError(f"{where} {key} is an empty list; give it values, or leave it out")
        if repeated := [item for index, item in enumerate(values) if item in values[:index]]:
            raise ValueError(f"{where} {key} has {repeated[0]!r} twice; give each value once")
        settings[f"{prefix}{key}"] = tuple(values)
    return settings


def fitting(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint`; an integer is accepted for a float.

    Raises:
        ValueError: the value has another type.
    """
    if get_origin(hint) in (Union, types.UnionType):  # `float` of `float | None`, since TOML has no null
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is Literal:
        if type(value) is str and value in get_args(hint):
            return value
        raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(get_args(hint))}")
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r}; it must be {_TYPE_NAMES.get(hint, 'left out')}")
    return value


def as_table(value: Any, where: str) -> Mapping[str, Any]:
    """Return `value` if it is a TOML table.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it must be a table")
    return value


def as_tables(value: Any, name: str, source: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The tables of `value`, an array of TOML tables, each with its location for messages.

    Raises:
        ValueError: it is something else, or empty.
    """
    if not is_table_array(value):
        raise ValueError(f"{source}: {name} is {value!r}; write a table [[{name}]] for each")
    return [(f"{source}: [[{name}]] {number}", table) for number, table in enumerate(value, start=1)]


def is_table_array(value: Any) -> bool:
    """Whether `value` is an array of TOML tables with at least one table."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def set_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """A copy of the experiment with other values of `training.x`, `prompt.x` or its own fields.

    Raises:
        ValueError: the values do not fit together.
    """
    parts = split(values)
    training = TrainingConfig(**{**vars(experiment.training), **parts["training"]})
    return experiment.replace(prompt=experiment.prompt.replace(**parts["prompt"]), training=training, **parts[""])


def split(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The values grouped by prefix: `training`, `prompt`, or empty for the experiment's own fields."""
    parts: dict[str, dict[str, Any]] = {"": {}, "training": {}, "prompt": {}}
    for name, value in values.items():
        part, _, key = name.rpartition(".")
        parts[part][key] = value
    return parts


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with dotted names: TOML reads `training.lr` as a nested table and `"training.lr"` as one key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("training", "prompt") and isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    return flat


def check_known(table: Iterable[str], known: Iterable[str], where: str) -> None:
    """Check that every key of a table is known.

    Raises:
        ValueError: naming the unknown key.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise ValueError(f"{where} has the unknown setting {key!r}; {suggest(key, known)}")
