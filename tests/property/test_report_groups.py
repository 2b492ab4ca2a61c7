"""Reports average runs that differ only in the seed: any other difference makes a row or a column of its own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from softprompt import DPT, ADePT, Experiment, Plain, TrainingConfig
from softprompt.analysis.report import formats
from softprompt.analysis.report.grid import Grid, arrange
from softprompt.analysis.report.groups import group
from softprompt.analysis.report.read import read
from softprompt.config import MEMORY_OPTIONS
from softprompt.tasks import Task

Write = Callable[..., Path]


def other_value(field: "dataclasses.Field[Any]") -> Any:
    """A value other than the default for a training setting."""
    if choices := get_args(get_type_hints(TrainingConfig)[field.name]):
        return next(choice for choice in choices if choice != field.default)
    if field.default is None:
        return 0.5
    return not field.default if isinstance(field.default, bool) else type(field.default)(field.default * 0.5 + 7)


OTHER_VALUES = {field.name: other_value(field) for field in dataclasses.fields(TrainingConfig)}
NOT_COMPARED = ("zero_shot", *MEMORY_OPTIONS)
"""Settings that do not change the trained prompt."""
SETTINGS = {name: value for name, value in OTHER_VALUES.items() if name not in NOT_COMPARED}


def make_grid(tmp_path: Path, *, choose: bool = False) -> Grid:
    """The grid alone: plots take seconds."""
    return arrange(group(read([tmp_path / "runs"])[0])[0], choose=choose)


def labels(tmp_path: Path) -> list[str]:
    return [row.label for row in make_grid(tmp_path).rows]


@pytest.mark.parametrize("name", SETTINGS)
def test_differing_training_setting_makes_another_row(name: str, write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6), test=0.5)
    changed = {name: 0.5} if name in ("warmup_ratio", "vocabulary_weight") else {name: SETTINGS[name]}  # shares
    write(training=dataclasses.replace(TrainingConfig(steps=6), **changed), test=0.7, seed=1)
    grid = make_grid(tmp_path)
    assert len(grid.rows) == 2
    assert all(f"{name}=" in label for label in labels(tmp_path))
    assert sorted(cell["test"] for cell in formats.cells(grid)) == [0.5, 0.7]


@pytest.mark.parametrize("name", NOT_COMPARED)
def test_setting_without_effect_makes_no_row(name: str, write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6), test=0.5)
    write(training=dataclasses.replace(TrainingConfig(steps=6), **{name: OTHER_VALUES[name]}), test=0.7, seed=1)
    [cell] = formats.cells(make_grid(tmp_path))
    assert cell["test"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": DPT(length=6, rank=3)}, "rank=3"),
        ({"prompt": DPT(length=7, rank=2)}, "length=7"),
        ({"prompt": DPT(anchor="none", length=6, rank=2, init="uniform", scale=1.0)}, "init=uniform"),
        ({"backbone": {"base": "org/other", "hash": "cd" * 32}}, "backbone=other"),
        ({"backbone": {"hash": "cd" * 32}}, "weights=cdcdcdcdcdcd"),
        ({"backbone": {"dtype": "bfloat16"}}, "dtype=bfloat16"),
        ({"fields": {"init_prompt": "runs/earlier"}}, "init_prompt=runs/earlier"),
        ({"fields": {"depth": "deep"}}, "depth=deep"),
        ({"fields": {"pool": "patches"}}, "pool=patches"),
    ],
)
def test_differing_experiment_makes_another_row(
    change: dict[str, Any], expected: str, write: Write, tmp_path: Path
) -> None:
    write()
    write(**change)
    grid = make_grid(tmp_path)
    assert len(grid.rows) == 2
    assert sum(expected in label for label in labels(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"task": "cb"}, {"fields": {"protocol": "paper"}}, {"fields": {"data": "/other"}}])
def test_other_task_protocol_or_data_is_a_column(change: dict[str, Any], write: Write, tmp_path: Path) -> None:
    write()
    write(**change)
    grid = make_grid(tmp_path)
    assert (len(grid.rows), len(grid.columns)) == (1, 2)


def test_only_the_seed_is_averaged_over(write: Write, tmp_path: Path) -> None:
    """Holds for fields added later too: depth and pool were once averaged over."""
    changes: dict[str, Any] = {
        "task": {"task": "cb"},
        "prompt": {"prompt": DPT(length=6, rank=3)},
        "training": {"training": TrainingConfig(steps=7)},
        "backbone": {"backbone": {"hash": "cd" * 32}},  # the weights count, not their path
        "dtype": {"backbone": {"dtype": "bfloat16"}},  # the dtype used, not the one asked for
        "data": {"fields": {"data": "/other"}},
        "init_prompt": {"fields": {"init_prompt": "runs/earlier"}},
        "context": {"fields": {"context": "/policy.md"}},
        "demonstrations": {"fields": {"demonstrations": 8}},
    }
    for field in dataclasses.fields(Experiment):
        if field.name not in ("seed", *changes):
            choices = get_args(get_type_hints(Experiment)[field.name])
            value = next(choice for choice in choices if choice != field.default)
            changes[field.name] = {"fields": {field.name: value}}
    write()
    for change in changes.values():
        write(**change)
    groups, skipped = group(read([tmp_path / "runs"])[0])
    assert skipped == []
    assert len(groups) == 1 + len(changes) == len(dataclasses.fields(Experiment))


def test_tasks_of_one_name_differ_by_their_files(write: Write, tmp_path: Path) -> None:
    for parent in ("here", "there"):
        folder = write(fields={"task": f"/{parent}/mine.toml"})
        record = json.loads((folder / "softprompt.json").read_text())
        record["task"] |= {"name": "mine", "source": "files", "files": {"train": f"/{parent}/rows.csv"}}
        (folder / "softprompt.json").write_text(json.dumps(record))
    grid = make_grid(tmp_path)
    assert grid.columns == ("mine data=/here/rows.csv", "mine data=/there/rows.csv")


def test_changed_rows_of_one_file_are_a_column(write: Write, tmp_path: Path) -> None:
    """Neither averaged over seeds, nor skipped as a second run of one seed."""
    write(test=0.5)
    write(test=0.7, data={"full": "changed rows"})
    write(test=0.8, data={"full": "changed rows"}, seed=1)
    groups, skipped = group(read([tmp_path / "runs"])[0])
    assert skipped == []
    grid = arrange(groups)
    assert grid.columns == ("rte rows=changed rows", "rte rows=rows")
    assert sorted(cell["test"] for cell in formats.cells(grid)) == [0.5, pytest.approx(0.75)]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Task)])
def test_task_field_makes_a_column(name: str, write: Write, tmp_path: Path) -> None:
    """All but those that say nothing about the rows, the model's input or the answer."""
    other = {
        "label_words": {"not_entailment": "No", "entailment": "Yes"},
        "messages": "chat",
        "image": "photo",
        "assistant_turns": "last",
        "broken": "skip",
        "metrics": ["macro_f1"],
        "max_input_tokens": 32,
        "templates": {"mine": {"text": "{premise}", "label_words": {}, "target": ""}},
        "files": {"train": "rows.csv"},
        "split_seed": 5,
    }
    write()
    folder = write(seed=1)
    record = json.loads((folder / "softprompt.json").read_text())
    record["task"][name] = other.get(name, f"{record['task'][name]} and {{hypothesis}}")
    task = object.__new__(Task)  # without the checks: many a single change would not be a task
    for field, value in record["task"].items():
        object.__setattr__(task, field, value)
    one, two = read([tmp_path / "runs"])[0]
    two = dataclasses.replace(two, run=dataclasses.replace(two.run, task=task))
    groups, _ = group([one, two])
    assert len(groups) == (1 if name in ("name", "description", "templates") else 2)


def test_label_names_the_task_field_that_differs(write: Write, tmp_path: Path) -> None:
    for seed, limit in enumerate((32, 512)):
        write(seed=seed, task_fields={"max_input_tokens": limit})
    assert make_grid(tmp_path).columns == ("rte task.max_input_tokens=32", "rte task.max_input_tokens=512")


def test_labels_name_only_what_differs(write: Write, tmp_path: Path) -> None:
    write(prompt=DPT(length=12, rank=10))
    write(prompt=DPT(length=12, rank=5))
    write(prompt=Plain(length=12))
    assert labels(tmp_path) == ["dpt rank=5", "dpt rank=10", "plain"]


def test_label_prefixes_method_setting_of_training_name(write: Write, tmp_path: Path) -> None:
    """Both have a dropout."""
    write(prompt=ADePT(length=6, width=2, dropout=0.5))
    write(prompt=ADePT(length=6, width=2, dropout=0.0))
    write(prompt=Plain(length=6))
    assert labels(tmp_path) == ["adept prompt.dropout=0", "adept prompt.dropout=0.5", "plain"]


@pytest.mark.usefixtures("unchecked")
def test_1_and_1_0_are_one_value(write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6, max_grad_norm=1))
    write(training=TrainingConfig(steps=6, max_grad_norm=1.0), seed=1)
    assert len(make_grid(tmp_path).rows) == 1


def test_equal_weights_at_two_paths_are_one_backbone(write: Write, tmp_path: Path) -> None:
    write(backbone={"base": "/here/tiny"})
    write(backbone={"base": "/there/tiny"}, seed=1)
    [cell] = formats.cells(make_grid(tmp_path))
    assert (cell["seeds"], cell["settings"]["backbone"]) == ([0, 1], "/here/tiny")


def test_duplicate_run_counts_once(write: Write, tmp_path: Path) -> None:
    write("late", test=0.9, created="2026-11-21T10:00:00+00:00")
    first = write("early", test=0.6)
    results, unread = read([tmp_path / "runs", first, first / ".." / "late"])
    assert len(results) == 2
    assert unread == []
    [merged], [skipped] = group(results)
    assert [result.name for result in merged.results] == ["early"]
    assert skipped.folder == str(tmp_path / "runs" / "late")
    assert "early" in skipped.reason


def add_to_record(folder: Path, **values: str) -> None:
    record = json.loads((folder / "softprompt.json").read_text())
    (folder / "softprompt.json").write_text(json.dumps(record | values))


@pytest.mark.parametrize("choose", [False, True])
@pytest.mark.parametrize(("name", "key"), [("context", "context_file"), ("init_prompt", "init_prompt")])
def test_files_with_other_contents_at_one_path_make_other_rows(
    name: str, key: str, choose: bool, write: Write, tmp_path: Path
) -> None:
    for seed, contents in enumerate(("ab" * 32, "cd" * 32)):
        add_to_record(write(test=0.5, seed=seed, fields={name: "file"}), **{key: contents})
    found = sorted(row.label for row in make_grid(tmp_path, choose=choose).rows)
    assert found == [f"dpt {name}_hash=abababab", f"dpt {name}_hash=cdcdcdcd"]


def test_seeds_with_their_own_demonstrations_are_averaged(write: Write, tmp_path: Path) -> None:
    """The seed draws them, so what is distilled differs as the seeds do."""
    for seed in range(3):
        folder = write(test=0.5 + 0.1 * seed, seed=seed, fields={"demonstrations": 2})
        add_to_record(folder, context=f"{seed}" * 64, context_file="ab" * 32)
    [cell] = formats.cells(make_grid(tmp_path))
    assert (cell["seeds"], cell["test"]) == ([0, 1, 2], pytest.approx(0.6))
