"""Every file in prompts/ is one method, which documents its reference, differences and settings."""

import dataclasses
import importlib
import inspect
import pkgutil

import pytest

from softprompt import prompts
from softprompt.prompts import METHODS, PromptConfig

OTHERS = {"base", "deep", "initialization"}
FILES = {result.name for result in pkgutil.iter_modules(prompts.__path__)} - OTHERS
each = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())


def test_one_file_is_one_method() -> None:
    assert set(METHODS) == FILES


@each
def test_method_is_in_the_file_of_its_name(config: type[PromptConfig]) -> None:
    assert config.__module__ == f"softprompt.prompts.{config.name}"


@each
@pytest.mark.parametrize("part", ["Reference:", "Differs:", ">>> "])
def test_method_docstring_names_reference_and_differences(config: type[PromptConfig], part: str) -> None:
    assert config.__doc__ is not None
    assert part in config.__doc__


@each
def test_every_setting_is_documented(config: type[PromptConfig]) -> None:
    """The string under a field is its help on the command line."""
    source = inspect.getsource(config) + inspect.getsource(PromptConfig)
    for field in dataclasses.fields(config):
        lines = source.split(f"\n    {field.name}: ", 1)[1].splitlines()
        assert lines[1].strip().startswith('"""'), field.name


@each
def test_method_is_final_and_frozen(config: type[PromptConfig]) -> None:
    assert config.__final__
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))


def test_final_methods_are_not_overridden() -> None:
    for config in METHODS.values():
        module = importlib.import_module(config.__module__)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ != config.__module__:
                continue
            for base in kind.__mro__[1:]:
                sealed = {n for n, member in vars(base).items() if getattr(member, "__final__", False)}
                assert not sealed & set(vars(kind)), f"{kind.__qualname__} overrides {base.__qualname__}"
