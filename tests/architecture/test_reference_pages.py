"""docs/results-file.md explains every key of a run's results, and docs/python.md every public name."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import softprompt
from softprompt.runs import creation
from softprompt.tasks import Score
from softprompt.training import finalize

DOCS = Path(__file__).parents[2] / "docs"


def first_columns(text: str) -> list[str]:
    """The names in code in the first column of every table."""
    columns = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [name for column in columns for name in re.findall(r"`(\w+)`", column)]


def written_keys(path: str) -> set[str]:
    """Keys of dictionary literals, and constant keys that are assigned to."""
    keys = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys |= {node.slice.value} if isinstance(node.slice, ast.Constant) else set()
    return keys


def test_results_page_explains_every_key() -> None:
    page = (DOCS / "results-file.md").read_text(encoding="utf-8")
    results, record = page.split("## The rest of ")
    of_score = {field.name for field in dataclasses.fields(Score)} - {"value", "n"}
    in_loops = {"teacher", "context_start", "context_end"}
    assert sorted(first_columns(results)) == sorted(written_keys(finalize.__file__) | of_score | in_loops)
    for key in written_keys(creation.__file__) - {"bfloat16", "float16", "softprompt", "python"}:
        assert f"`{key}`" in record, key


def test_python_page_names_every_public_name_once() -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert sorted(first_columns(page)) == sorted(softprompt.__all__)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row for row in rows if not row.split(" | ")[1].strip(" |")] == []


EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_python_examples_import_only_public_names(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "softprompt":
            assert {alias.name for alias in node.names} <= set(softprompt.__all__)
