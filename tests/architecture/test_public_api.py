"""Every package's `__all__` is importable, sorted and documented, and the docs name only what exists."""

import ast
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path
from typing import Any

import pytest

import softprompt

SOURCE = Path(softprompt.__file__).parent
ROOT = SOURCE.parents[1]
PACKAGES = sorted(info.name for info in pkgutil.walk_packages(softprompt.__path__, "softprompt.") if info.ispkg)
each_package = pytest.mark.parametrize("name", ["softprompt", *PACKAGES])
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/README.md")]
)
FILE_SUFFIXES = {"json", "safetensors", "toml"}
"""`softprompt.json` is a file of a run."""


def exported(name: str) -> list[str]:
    return list(getattr(importlib.import_module(name), "__all__", []))


def sort_key(name: str) -> tuple[int, str]:
    """The order of ruff: constants, then classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@each_package
def test_all_is_sorted_and_importable(name: str) -> None:
    package, names = importlib.import_module(name), exported(name)
    assert names == sorted(set(names), key=sort_key)
    assert [other for other in names if not hasattr(package, other)] == []


@each_package
def test_all_has_no_private_name(name: str) -> None:
    assert [other for other in exported(name) if other.startswith("_") and other != "__version__"] == []


def constant_doc(module: str, name: str) -> str | None:
    """The text under the assignment of `name`, in `module` or where that imports it from."""
    file = Path(inspect.getfile(importlib.import_module(module)))
    statements = ast.parse(file.read_text()).body
    for number, node in enumerate(statements):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            after = statements[number + 1] if number + 1 < len(statements) else None
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            return str(after.value.value) if is_text else None
        if isinstance(node, ast.ImportFrom) and node.module and name in {a.asname or a.name for a in node.names}:
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return constant_doc(node.module, original)
    return None


def documentation(package: str, name: str) -> str | None:
    value: Any = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) and value.__module__.startswith("softprompt"):
        text = value.__dict__.get("__doc__")
        return None if text and text.startswith(f"{value.__name__}(") else text  # a dataclass writes its own
    if isinstance(value, types.FunctionType | types.ModuleType):
        return value.__doc__
    locations = getattr(importlib.import_module(package), "_LOCATIONS", {})  # of names imported at first use
    return constant_doc(locations.get(name, package).split(":")[0], name)


@each_package
def test_all_is_documented(name: str) -> None:
    names = [other for other in exported(name) if other != "__version__"]
    assert [other for other in names if not (documentation(name, other) or "").strip()] == []


def resolves(dotted: str) -> bool:
    """Whether a dotted name is an object or a module."""
    value: Any = softprompt
    for number, part in enumerate(dotted.split(".")[1:], start=2):
        if not hasattr(value, part):
            try:
                value = importlib.import_module(".".join(dotted.split(".")[:number]))
            except ModuleNotFoundError:
                return False
        else:
            value = getattr(value, part)
    return True


def mentioned(text: str) -> set[str]:
    """The names of the package in code of a Markdown page: `softprompt.x.y`, and `from softprompt.x import y`."""
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    dotted = set(re.findall(r"(?<![\w./-])softprompt(?:\.[A-Za-z_]\w*)+", code))
    dotted = {name for name in dotted if name.rpartition(".")[2] not in FILE_SUFFIXES}
    for module, names in re.findall(r"from (softprompt[\w.]*) import ([\w, ]+)", code):
        dotted |= {f"{module}.{name.split(' as ')[0].strip()}" for name in names.split(",") if name.strip()}
    return dotted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_mentions_only_what_exists(page: Path) -> None:
    assert [name for name in sorted(mentioned(page.read_text(encoding="utf-8"))) if not resolves(name)] == []


def test_mentions_are_detected() -> None:
    text = "see `softprompt.nothing`, `softprompt.json`\n```python\nfrom softprompt.tasks import score, nothing\n```"
    names = {"softprompt.nothing", "softprompt.tasks", "softprompt.tasks.score", "softprompt.tasks.nothing"}
    assert mentioned(text) == names
    assert not resolves("softprompt.nothing")
    assert not resolves("softprompt.tasks.nothing")
    assert resolves("softprompt.tasks.score")
    assert resolves("softprompt.training.trainer.train")


def test_package_has_few_entries() -> None:
    entries = {path.name for path in SOURCE.iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(entries) <= 16
