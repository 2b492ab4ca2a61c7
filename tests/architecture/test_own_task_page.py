"""docs/own-task.md lists every key and metric, and its examples are valid tasks."""

import re
from pathlib import Path

import pytest

from softprompt.tasks import METRICS
from softprompt.tasks.user import _KEYS, load_task

PAGE = (Path(__file__).parents[2] / "docs" / "own-task.md").read_text(encoding="utf-8")


def test_page_lists_every_key_and_metric() -> None:
    rows = re.findall(r"^\| `\[?(\w+)\]?` \|", PAGE, re.MULTILINE)
    assert sorted(set(rows) & set(_KEYS)) == sorted(_KEYS)
    lines = [line for line in PAGE.splitlines() if re.search(r"\| (labels|texts|numbers) \|", line)]
    kinds = {name: line.split(" | ")[1] for line in lines for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert kinds == {name: metric.answer_kind for name, metric in METRICS.items()}


@pytest.mark.parametrize("number", [0, 1])
def test_page_examples_are_tasks(tmp_path: Path, number: int) -> None:
    example = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[number]
    (tmp_path / "task.toml").write_text(example)
    assert load_task(str(tmp_path / "task.toml")).metrics[0] in ("macro_f1", "pearson")
