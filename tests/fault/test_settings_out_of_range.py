"""Numbers that JSON or a random generator cannot take are refused as settings, before a run begins."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest

from softprompt import Experiment, TrainingConfig
from softprompt.prompts import METHODS


def float_settings() -> Iterator[Any]:
    for config in (TrainingConfig, *METHODS.values()):
        if config.__module__.startswith("softprompt."):
            for name, kind in get_type_hints(config).items():
                if kind in (float, float | None):
                    yield pytest.param(config, name, id=f"{config.__name__}-{name}")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("config", "name"), float_settings())
def test_infinite_and_nan_settings_are_refused(config: Callable[..., Any], name: str, value: float) -> None:
    needed = {"anchor": "none"} if "anchor" in {field.name for field in dataclasses.fields(config)} else {}
    with pytest.raises(ValueError, match=rf"^{name} is {value}; .*must be"):
        config(**needed, **{name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["steps", "patience"])
def test_infinite_whole_number_of_a_record_is_refused(name: str) -> None:
    """JSON as Python reads it has `Infinity`."""
    values = Experiment().to_json()
    values["training"][name] = math.inf
    with pytest.raises(ValueError, match=f"{name} is inf"):
        Experiment.from_json(values)


@pytest.mark.parametrize("seed", [-1, 2**63, 99999999999999999999999])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed is {seed}; it must be from 0 to 9223372036854775807$"):
        Experiment(seed=seed)
    assert Experiment(seed=2**63 - 1).seed == 2**63 - 1
