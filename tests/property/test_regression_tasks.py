"""Numbers as targets: they are written out, read back and scored; a gold that is not a number is refused."""

import math
from pathlib import Path

import numpy as np
import pytest

from softprompt.tasks import METRICS, Answers, Task, score
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task

TOML = 'train = "rows.csv"\ntemplate = "How good: {text}\\nStars:"\ntarget = "stars"\nmetrics = ["pearson", "mae"]\n'
TASK = Task(name="n", template="{a}", target="y", metrics=("pearson", "spearman", "mae"))


def loaded(folder: Path, cells: list[str]) -> Task:
    (folder / "rows.csv").write_text("text,stars\n" + "".join(f"t {i},{cell}\n" for i, cell in enumerate(cells)))
    (folder / "task.toml").write_text(TOML)
    return load_task(str(folder / "task.toml"))


def test_mae_is_the_mean_absolute_error() -> None:
    rng = np.random.default_rng(0)
    golds, ours = rng.normal(size=50), rng.normal(size=50)
    answers = Answers(predictions=ours, golds=golds)
    assert METRICS["mae"](answers) == pytest.approx(float(np.mean(np.abs(ours - golds))))
    low, high = METRICS["mae"].interval(answers, 200, 0)
    assert low < METRICS["mae"](answers) < high


def test_answer_that_is_not_a_number_is_the_farthest_gold() -> None:
    result = score(TASK, ["0", "alike", "4"], ["0", "1", "4"], majority=None, resamples=20)
    assert result.extra_metrics["mae"] == pytest.approx(3 / 3)  # taken for 4 where 1 was right
    assert score(TASK, ["0", None, "inf"], ["0", "1", "4"], majority=None, resamples=20).extra_metrics[
        "mae"
    ] == pytest.approx(7 / 3)


def test_metric_where_lower_is_better_cannot_be_first() -> None:
    with pytest.raises(ValueError, match="list pearson or spearman before it"):
        Task(name="n", template="{a}", target="y", metrics=("mae", "pearson"))
    with pytest.raises(ValueError, match="scores numbers, but task 'n' answers with labels"):
        Task(name="n", template="{a}", label="y", label_words={"0": "a", "1": "b"}, metrics=("accuracy", "mae"))


def test_numbers_in_a_file_make_a_task(tmp_path: Path) -> None:
    task = loaded(tmp_path, [f"{i % 5}.5" for i in range(40)])
    assert len(splits(task).train) == 28
    assert math.isfinite(float(splits(task).majority))


@pytest.mark.parametrize("cell", ["n/a", "4 stars", "nan", "inf"])
def test_gold_that_is_not_a_number_is_refused(tmp_path: Path, cell: str) -> None:
    task = loaded(tmp_path, ["1", "2", cell, *["3"] * 30])
    with pytest.raises(ValueError, match=rf"row 3 of .*rows\.csv has '{cell}' in column 'stars', but pearson, mae"):
        splits(task)
