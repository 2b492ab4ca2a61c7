"""Settings as a sweep's file says them: checked against the fields that they are for."""

import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softprompt.config import Experiment, TrainingConfig
from softprompt.tasks.task import suggest

Choices = dict[str, tuple[Any, ...]]
"""Values by dotted name (`seed`, `training.lr`, `prompt.rank`): one where a setting is fixed, several for a list."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def hints(kind: type[Any]) -> dict[str, Any]:
    """The fields of a frozen value with what each may hold; of an experiment those that are one value."""
    known = get_type_hints(kind)
    if kind is Experiment:
        return {name: hint for name, hint in known.items() if name not in ("prompt", "training", "baseline")}
    fields = kind.__dataclass_fields__
    return {name: hint for name, hint in known.items() if name in fields}


def choices(table: Any, kind: type[Any], where: str, lead: str = "") -> Choices:
    """The table's settings, each with its values, under `lead`'s names.

    Raises:
        ValueError: an unknown setting, a value of another kind, an empty list, or one that says a value twice.
    """
    known, found = hints(kind), Choices()
    for key, value in as_table(table, where).items():
        if key not in known:
            raise ValueError(f"{where} has the unknown setting {key!r}; {suggest(key, known)}")
        values = [fitting(known[key], one, f"{where} {key}") for one in (value if type(value) is list else [value])]
        if not values:
            raise ValueError(f"{where} {key} is an empty list; give it values, or leave it out")
        if twice := [one for place, one in enumerate(values) if one in values[:place]]:
            raise ValueError(f"{where} {key} has {twice[0]!r} twice; give each value once")
        found[f"{lead}{key}"] = tuple(values)
    return found


def fitting(hint: Any, value: Any, where: str) -> Any:
    """`value` as the field wants it: a whole number is a number too.

    Raises:
        ValueError: it is of another kind.
    """
    hint = _only(hint)
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is Literal:
        if type(value) is str and value in get_args(hint):
            return value
        raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(get_args(hint))}")
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r}; it must be {_KINDS.get(hint, 'left out')}")
    return value


def _only(hint: Any) -> Any:
    """The kind that a field has when it is given: `float` of `float | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def as_table(value: Any, where: str) -> Mapping[str, Any]:
    """`value`, a TOML table.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it must be a table")
    return value


def as_tables(value: Any, name: str, source: str) -> list[tuple[str, Mapping[str, Any]]]:
    """`value`, an array of TOML tables, each with the words that name it in a message.

    Raises:
        ValueError: it is something else, or empty.
    """
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f"{source}: {name} is {value!r}; write a table [[{name}]] for each")
    return [(f"{source}: [[{name}]] {number}", one) for number, one in enumerate(value, start=1)]


def set_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with other values of `training.x`, `prompt.x` or its own fields.

    Raises:
        ValueError: values that do not fit together.
    """
    parts = split(values)
    training = TrainingConfig(**{**vars(experiment.training), **parts["training"]})
    return experiment.replace(prompt=experiment.prompt.replace(**parts["prompt"]), training=training, **parts[""])


def split(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by the part that they are for: `training`, `prompt`, or none for the experiment's own."""
    parts: dict[str, dict[str, Any]] = {"": {}, "training": {}, "prompt": {}}
    for name, value in values.items():
        part, _, key = name.rpartition(".")
        parts[part][key] = value
    return parts


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with `training.lr` for both of TOML's ways to write it, in quotation marks and without."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = key in ("training", "prompt") and isinstance(value, Mapping)
        flat.update({f"{key}.{name}": one for name, one in value.items()} if inner else {key: value})
    return flat


def refuse_unknown(table: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a key that a table does not have.

    Raises:
        ValueError: naming the key.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise ValueError(f"{where} has the unknown setting {key!r}; {suggest(key, known)}")
