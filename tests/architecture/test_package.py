"""The house rules: names, layers, file sizes, doctests, and no comparison with a method's name."""

import ast
import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import softprompt
from softprompt.prompts import METHODS

SOURCE = Path(softprompt.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted(
    found.name for found in pkgutil.walk_packages(softprompt.__path__, "softprompt.") if "__main__" not in found.name
)
HEAVY = {"transformers", "datasets", "pandas", "pyarrow", "accelerate", "sklearn", "scipy", "huggingface_hub"}
"""Libraries that take long to import, besides torch."""
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ruffs_order(name: str) -> tuple[int, str]:
    """How ruff sorts `__all__`: CONSTANTS, then Classes, then functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted_and_has_no_module() -> None:
    assert list(softprompt.__all__) == sorted(set(softprompt.__all__), key=ruffs_order)
    for name in softprompt.__all__:
        assert not isinstance(getattr(softprompt, name), types.ModuleType), name
    with pytest.raises(AttributeError, match="module 'softprompt' has no attribute 'nothing'"):
        _ = softprompt.nothing


def type_checking_imports(file: Path) -> dict[str, str]:
    """What the TYPE_CHECKING block of a package imports: name and `module:attribute`."""
    tree = ast.parse(file.read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            found[alias.asname or alias.name] = f"{node.module}:{alias.name}"
    return found


def test_type_checking_imports_equal_lazy_imports() -> None:
    assert type_checking_imports(SOURCE / "__init__.py") == softprompt._LOCATIONS
    assert set(softprompt._LOCATIONS) == set(softprompt.__all__)
    for name, location in softprompt._LOCATIONS.items():
        module, attribute = location.split(":")
        assert getattr(softprompt, name) is getattr(importlib.import_module(module), attribute)


def test_no_public_name_is_shadowed_by_a_module() -> None:
    assert not [name for name in softprompt.__all__ if f"softprompt.{name}" in MODULES if name != "sweep"]
    in_a_new_process("import softprompt.sweep; import softprompt; assert callable(softprompt.sweep)")


def test_import_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, softprompt, softprompt.cli; assert 'train' in dir(softprompt); softprompt.cli.main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'sklearn', 'tyro'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    assert "usage: softprompt" in in_a_new_process(code)


def test_help_of_short_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys; from softprompt.cli import main\n"
        "for name in ('evaluate', 'predict', 'list', 'fetch', 'doctor'):\n"
        "    assert main([name, '--help']) == 0\n"
        "    assert main([name, '--no-such-flag']) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'accelerate', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "usage: softprompt doctor" in in_a_new_process(code)


def test_listing_assets_loads_nothing_heavy() -> None:
    code = (
        "import sys; from softprompt.cli import main; assert main(['list', 'assets']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'accelerate', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert "smollm2-135m" in in_a_new_process(code)


@pytest.mark.parametrize(
    ("command", "not_needed"),
    [
        ("['list', 'tasks']", {"torch", *HEAVY}),
        ("['list', 'methods']", HEAVY),
        ("['train', '--help']", HEAVY),
        ("['distil', '--help']", HEAVY),
    ],
)
def test_command_imports_only_what_it_needs(command: str, not_needed: set[str]) -> None:
    code = (
        f"import sys; from softprompt.cli import main; assert main({command}) == 0\n"
        f"loaded = set({sorted(not_needed)}) & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert in_a_new_process(code)


def test_failed_command_imports_only_what_it_needs() -> None:
    """An error's message needs no library either."""
    code = (
        "import sys; from softprompt.cli import main; assert main(['list', 'methods', '--dim', '0']) == 1\n"
        "assert 'torch' not in sys.modules"
    )
    in_a_new_process(code)


def test_every_reader_is_registered_before_rows_are_read() -> None:
    code = (
        "import softprompt.tasks.data.splits; from softprompt.tasks import READERS\n"
        "assert {'files', 'images', 'hub', 'mnist', 'boolq'} <= set(READERS), READERS"
    )
    in_a_new_process(code)


def test_transformers_is_quiet_when_a_command_imports_it() -> None:
    code = (
        "from softprompt.cli.console import quiet; quiet(); from transformers.utils import logging\n"
        "assert logging.get_verbosity() == logging.ERROR; assert not logging.is_progress_bar_enabled()"
    )
    in_a_new_process(code)


def test_imports_point_down(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--cache-dir", tmp_path],
        cwd=SOURCE.parents[1],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_every_module_is_in_a_layer() -> None:
    """A module that no layer names would escape the contract."""
    config = (SOURCE.parents[1] / "pyproject.toml").read_text()
    layers = config.split("layers = [", 1)[1].split("]", 1)[0]
    listed = {name for line in layers.splitlines() for name in line.strip(' ,"').split(" | ")} - {""}
    optional = {name.strip("()") for name in listed if name.startswith("(")}
    there = {found.name for found in pkgutil.iter_modules(softprompt.__path__)}
    assert there | optional == {name.strip("()") for name in listed}


@each_file
def test_no_file_has_more_than_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def compared_texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every text that a comparison, a `match` or a dictionary chooses by, with its line."""
    for node in ast.walk(tree):
        selected: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            selected = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            selected = [node.value]
        elif isinstance(node, ast.Subscript):
            selected = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            selected = [node.args[1]]
        for part in selected:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield node.lineno, leaf.value
                if isinstance(leaf, ast.Name):
                    yield node.lineno, leaf.id


def known_by_name(file: Path) -> list[str]:
    """Where a file chooses by a method's name or class."""
    names = {name: config.__module__ for name, config in METHODS.items()}
    names |= {config.__name__: config.__module__ for config in METHODS.values()}
    home = "softprompt." + ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    found = compared_texts(ast.parse(file.read_text()))
    return [f"{file.name}:{line} chooses by {text!r}" for line, text in found if names.get(text, home) != home]


@each_file
def test_no_file_compares_a_method_name(file: Path) -> None:
    assert known_by_name(file) == []


@pytest.mark.parametrize(
    "code",
    [
        'if config.name == "dpt": pass',
        'if method in ("plain", "dept"): pass',
        "if isinstance(config, DPT): pass",
        'x = METHODS["bpt"]',
        'match name:\n    case "residual": pass',
    ],
)
def test_method_name_comparisons_are_detected(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: code)
    assert known_by_name(SOURCE / "train.py")


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder()
    examples = [item for name in MODULES for item in finder.find(importlib.import_module(name)) if item.examples]
    assert len(examples) >= len(METHODS)


@each_file
def test_only_the_command_line_prints(file: Path) -> None:
    tree = ast.parse(file.read_text())
    prints = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]
    assert not prints or "cli" in file.parts
