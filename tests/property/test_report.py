"""Reports of runs: nothing unlike is averaged, and no number is without its company."""

import dataclasses
import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softprompt import DPT, ADePT, Experiment, Plain, TrainingConfig
from softprompt.analysis.report import Report, formats, report, tables
from softprompt.analysis.report.compare import differences
from softprompt.analysis.report.grid import Grid, arrange
from softprompt.analysis.report.groups import Spread, group
from softprompt.analysis.report.read import read
from softprompt.config import MEMORY_OPTIONS

DIM = 32
Write = Callable[..., Path]


def another(field: "dataclasses.Field[Any]") -> Any:
    """Another value than the default for a setting of the training."""
    if choices := get_args(get_type_hints(TrainingConfig)[field.name]):
        return next(choice for choice in choices if choice != field.default)
    return not field.default if isinstance(field.default, bool) else type(field.default)(field.default * 0.5 + 7)


OTHERS = {field.name: another(field) for field in dataclasses.fields(TrainingConfig)}
SAME = ("zero_shot", *MEMORY_OPTIONS)
"""Settings that score one thing more, or need less, and train the same."""
SETTINGS = {name: value for name, value in OTHERS.items() if name not in SAME}


def made(tmp_path: Path, **options: Any) -> Report:
    return report([tmp_path / "runs"], out=tmp_path / "out", **options)


def tabled(tmp_path: Path, *, choose: bool = False) -> Grid:
    """Without the pictures, which take their time."""
    return arrange(group(read([tmp_path / "runs"])[0])[0], choose=choose)


def labels(tmp_path: Path) -> list[str]:
    return [row.label for row in tabled(tmp_path).rows]


def test_a_cell_is_the_mean_over_seeds_with_both_intervals(write: Write, tmp_path: Path) -> None:
    scores = [0.61, 0.66, 0.58]
    for seed, score in enumerate(scores):
        write(test=score, seed=seed)
    [cell] = formats.cells(tabled(tmp_path))
    assert cell["seeds"] == [0, 1, 2]
    assert cell["test"] == pytest.approx(np.mean(scores))
    assert cell["test_sd"] == pytest.approx(np.std(scores, ddof=1))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(scores), scale=stats.sem(scores))
    assert cell["test_seeds_interval"] == pytest.approx([low, high])
    assert cell["test_rows_interval"] == pytest.approx([np.mean(scores) - 0.05, np.mean(scores) + 0.05])
    assert (cell["trainable"], cell["seconds"], cell["n_test"]) == (2 * (6 + DIM), 12.5, [100, 100, 100])
    size = (tmp_path / "runs" / "0-run" / "softprompt.safetensors").stat().st_size
    assert cell["bytes"] == size > 100


def test_one_seed_has_no_spread(write: Write, tmp_path: Path) -> None:
    write(test=0.61)
    [cell] = formats.cells(tabled(tmp_path))
    assert cell["test_sd"] is cell["test_seeds_interval"] is None
    assert "±" not in tables.scores(tabled(tmp_path)).rows[-1][1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_makes_another_row(name: str, write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6), test=0.5)
    changed = {name: 0.5} if name in ("warmup_ratio", "vocabulary_weight") else {name: SETTINGS[name]}  # shares
    write(training=dataclasses.replace(TrainingConfig(steps=6), **changed), test=0.7, seed=1)
    found = tabled(tmp_path)
    assert len(found.rows) == 2
    assert all(f"{name}=" in label for label in labels(tmp_path))
    assert sorted(cell["test"] for cell in formats.cells(found)) == [0.5, 0.7]


@pytest.mark.parametrize("name", SAME)
def test_a_setting_that_changes_nothing_of_what_comes_makes_none(name: str, write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6), test=0.5)
    write(training=dataclasses.replace(TrainingConfig(steps=6), **{name: OTHERS[name]}), test=0.7, seed=1)
    [cell] = formats.cells(tabled(tmp_path))
    assert cell["test"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": DPT(length=6, rank=3)}, "rank=3"),
        ({"prompt": DPT(length=7, rank=2)}, "length=7"),
        ({"prompt": DPT(anchor="none", length=6, rank=2, init="uniform", scale=1.0)}, "init=uniform"),
        ({"backbone": {"base": "org/other", "hash": "cd" * 32}}, "backbone=other"),
        ({"backbone": {"hash": "cd" * 32}}, "weights=cdcdcdcdcdcd"),
        ({"backbone": {"dtype": "bfloat16"}}, "dtype=bfloat16"),
        ({"wanted": {"init_prompt": "runs/earlier"}}, "init_prompt=runs/earlier"),
        ({"wanted": {"depth": "deep"}}, "depth=deep"),
        ({"wanted": {"pool": "patches"}}, "pool=patches"),
    ],
)
def test_so_does_all_else(change: dict[str, Any], told: str, write: Write, tmp_path: Path) -> None:
    write()
    write(**change)
    found = tabled(tmp_path)
    assert len(found.rows) == 2
    assert sum(told in label for label in labels(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"task": "cb"}, {"wanted": {"protocol": "paper"}}, {"wanted": {"data": "/other"}}])
def test_another_task_protocol_or_data_is_another_column(change: dict[str, Any], write: Write, tmp_path: Path) -> None:
    write()
    write(**change)
    found = tabled(tmp_path)
    assert (len(found.rows), len(found.columns)) == (1, 2)


def test_no_field_of_an_experiment_but_the_seed_is_averaged_over(write: Write, tmp_path: Path) -> None:
    """Also none that is added one day: depth and pool once were."""
    others: dict[str, Any] = {
        "task": {"task": "cb"},
        "prompt": {"prompt": DPT(length=6, rank=3)},
        "training": {"training": TrainingConfig(steps=7)},
        "backbone": {"backbone": {"hash": "cd" * 32}},  # its weights count, and not where they lie
        "dtype": {"backbone": {"dtype": "bfloat16"}},  # what it came to, and not what was asked for
        "data": {"wanted": {"data": "/other"}},
        "init_prompt": {"wanted": {"init_prompt": "runs/earlier"}},
    }
    for field in dataclasses.fields(Experiment):
        if field.name not in ("seed", *others):
            choices = get_args(get_type_hints(Experiment)[field.name])
            value = next(choice for choice in choices if choice != field.default)
            others[field.name] = {"wanted": {field.name: value}}
    write()
    for change in others.values():
        write(**change)
    made, left_out = group(read([tmp_path / "runs"])[0])
    assert left_out == []
    assert len(made) == 1 + len(others) == len(dataclasses.fields(Experiment))


def test_two_tasks_of_one_name_and_wording_have_their_own_files(write: Write, tmp_path: Path) -> None:
    for place in ("here", "there"):
        folder = write(wanted={"task": f"/{place}/mine.toml"})
        record = json.loads((folder / "softprompt.json").read_text())
        record["task"] |= {"name": "mine", "source": "files", "files": {"train": f"/{place}/rows.csv"}}
        (folder / "softprompt.json").write_text(json.dumps(record))
    found = tabled(tmp_path)
    assert found.columns == ("mine data=/here/rows.csv", "mine data=/there/rows.csv")


def test_labels_say_what_differs_and_no_more(write: Write, tmp_path: Path) -> None:
    write(prompt=DPT(length=12, rank=10))
    write(prompt=DPT(length=12, rank=5))
    write(prompt=Plain(length=12))
    assert labels(tmp_path) == ["dpt rank=5", "dpt rank=10", "plain"]


def test_a_setting_of_a_method_is_told_from_the_trainings(write: Write, tmp_path: Path) -> None:
    """Both have a dropout."""
    write(prompt=ADePT(length=6, width=2, dropout=0.5))
    write(prompt=ADePT(length=6, width=2, dropout=0.0))
    write(prompt=Plain(length=6))
    assert labels(tmp_path) == ["adept prompt.dropout=0", "adept prompt.dropout=0.5", "plain"]


@pytest.mark.usefixtures("unchecked")
def test_whole_numbers_are_one_value_however_written(write: Write, tmp_path: Path) -> None:
    write(training=TrainingConfig(steps=6, max_grad_norm=1))
    write(training=TrainingConfig(steps=6, max_grad_norm=1.0), seed=1)
    assert len(tabled(tmp_path).rows) == 1


def test_the_same_weights_elsewhere_are_the_same_backbone(write: Write, tmp_path: Path) -> None:
    write(backbone={"base": "/here/tiny"})
    write(backbone={"base": "/there/tiny"}, seed=1)
    [cell] = formats.cells(tabled(tmp_path))
    assert (cell["seeds"], cell["settings"]["backbone"]) == ([0, 1], "/here/tiny")


def test_the_same_run_counts_once(write: Write, tmp_path: Path) -> None:
    write("late", test=0.9, created="2026-11-21T10:00:00+00:00")
    first = write("early", test=0.6)
    results, unread = read([tmp_path / "runs", first, first / ".." / "late"])
    assert len(results) == 2
    assert unread == []
    [one], [left] = group(results)
    assert [result.name for result in one.results] == ["early"]
    assert left.folder == str(tmp_path / "runs" / "late")
    assert "early" in left.reason


@pytest.mark.parametrize(
    ("majority", "standing", "mark"),
    [(0.40, "above", ""), (0.549, "above", ""), (0.56, "within", "†"), (0.64, "within", "†"), (0.70, "below", "‡")],
)
def test_the_table_says_how_a_score_stands(
    majority: float, standing: str, mark: str, write: Write, tmp_path: Path
) -> None:
    write(test=0.6, majority=majority)
    found = tabled(tmp_path)
    assert formats.cells(found)[0]["against_majority"] == standing
    shown = tables.scores(found).rows[-1][1].splitlines()[0]
    assert shown == f"60.0 (1){mark}"
    assert (
        any(note.startswith(mark) for note in tables.scores(found).notes)
        if mark
        else "†" not in str(tables.scores(found))
    )


def test_either_interval_may_hold_the_majority(write: Write, tmp_path: Path) -> None:
    """Wide over seeds, narrow over rows."""
    for seed, score in enumerate((0.55, 0.75)):
        write(test=score, seed=seed, ci_low=score - 0.01, ci_high=score + 0.01, majority=0.5)
    assert formats.cells(tabled(tmp_path))[0]["against_majority"] == "within"


def test_same_rows_are_cautioned(write: Write, tmp_path: Path) -> None:
    write(selection_warning="selected and reported on the same rows", wanted={"protocol": "paper"})
    found = tabled(tmp_path)
    assert tables.scores(found).rows[-1][1].splitlines()[0].endswith("§")
    assert any("same rows" in note for note in tables.scores(found).notes)


@pytest.mark.parametrize(("warning", "noted"), [(None, False), ("all 100 rows got one answer, 'a'", True)])
def test_report_notes_only_runs_with_a_warning(warning: str | None, noted: bool, write: Write, tmp_path: Path) -> None:
    """A record without a warning holds null, as `train` writes it."""
    write(warning=warning)
    notes = tables.scores(tabled(tmp_path)).notes
    assert any(note.startswith("Look at ") for note in notes) == noted


def _unfinished(folder: Path) -> None:
    record = json.loads((folder / "softprompt.json").read_text())
    (folder / "softprompt.json").write_text(json.dumps({**record, "results": None}))


def _results(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "softprompt.json").read_text())
        record["results"] |= changes
        (folder / "softprompt.json").write_text(json.dumps(record))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (_unfinished, "is not finished"),
    "cut": (lambda folder: (folder / "softprompt.json").write_text('{"format": 1, "exp'), "not readable as JSON"),
    "no object": (lambda folder: (folder / "softprompt.json").write_text("[]"), "not an object"),
    "later": (lambda folder: (folder / "softprompt.json").write_text('{"format": 2}'), "upgrade"),
    "deep": (lambda folder: (folder / "softprompt.json").write_text("[" * 100_000), "JSON"),
    "no tensors": (lambda folder: (folder / "softprompt.safetensors").unlink(), "lacks softprompt.safetensors"),
    "nan": (_results(test=math.nan), "'test' is nan"),
    "text": (_results(majority="half"), "'majority' is 'half'"),
    "true": (_results(ci_low=True), "'ci_low' is True"),
    "huge": (_results(test=10**400), "too large"),
    "nothing trained": (_results(trainable=0), "no trained numbers"),
    "extra_metrics": (_results(extra_metrics={"f1": None}), "'f1' is None"),
    "binary": (lambda folder: (folder / "softprompt.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "bad results": (
        lambda folder: (folder / "softprompt.json").write_text(
            re.sub(r'"results": {.*}', '"results": 3}', (folder / "softprompt.json").read_text())
        ),
        "results are int",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_read_is_named_and_left_out(name: str, write: Write, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    write("good")
    damage(write("bad", seed=1))
    results, [left] = read([tmp_path])
    assert [result.name for result in results] == ["good"]
    assert left.folder.endswith("bad")
    assert reason in left.reason
    shutil.rmtree(tmp_path / "runs" / "good")
    with pytest.raises(ValueError, match=r"there is no finished run in .*bad: "):
        made(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tail", ['{"step": 7, "lo', "[1]\n", '{"step": 2, "loss": 1}\n', '{"step": 7, "loss": NaN}\n'])
def test_a_curve_ends_where_it_is_damaged(tail: str, write: Write, tmp_path: Path) -> None:
    folder = write()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(tail + '{"step": 9, "loss": 1}\n')
    [result] = read([tmp_path])[0]
    assert [point.step for point in result.curve] == [1, 2, 3, 4, 5, 6]


def test_runs_are_found_at_any_depth_and_not_in_runs_or_hidden_folders(write: Write, tmp_path: Path) -> None:
    inner = write("group-of-runs/run", seed=0)
    shutil.copytree(inner, inner / "checkpoints" / "copy")
    shutil.copytree(inner, tmp_path / "runs" / ".draft")
    assert [Path(result.run.folder) for result in read([tmp_path])[0]] == [inner]
    with pytest.raises(FileNotFoundError, match="'nowhere' is no folder"):
        read(["nowhere"])


def test_trials_of_a_search_are_seen_only_where_they_are_asked_for(write: Write, tmp_path: Path) -> None:
    chosen = write("chosen")
    trial = write("search/study/trial", training=TrainingConfig(steps=6, lr=0.5))
    (trial.parent / "study.journal").write_text("{}\n")
    results, [left] = read([tmp_path])
    assert [result.run.folder for result in results] == [chosen]
    assert left.folder == str(trial.parent)
    assert left.reason == "trials of a search, by which settings were chosen; give this folder itself to see them"
    for asked in (trial.parent, trial.parent.parent, trial):
        results, none = read([asked])
        assert ([result.run.folder for result in results], none) == ([trial], [])


def test_a_run_is_no_place_for_a_report(write: Write) -> None:
    folder = write()
    with pytest.raises(ValueError, match="is a run"):
        report([folder], out=folder)


def test_a_report_takes_the_place_of_the_last(write: Write, tmp_path: Path) -> None:
    write()
    first = {path.name: path.read_bytes() for path in made(tmp_path).files}
    assert {path.name: path.read_bytes() for path in made(tmp_path).files} == first
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(first)


def test_without_the_extra(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'softprompt\[report\]'"):
        made(tmp_path)


# Differences


def test_differences_are_paired_by_seed(write: Write, tmp_path: Path) -> None:
    base, other = {0: 0.50, 1: 0.60, 2: 0.70}, {1: 0.66, 2: 0.74, 3: 0.10}
    for seed, score in base.items():
        write(prompt=Plain(length=6), seed=seed, test=score)
    for seed, score in other.items():
        write(seed=seed, test=score)
    [found] = differences(tabled(tmp_path), "plain")
    assert (found.row, found.seeds) == ("dpt", (1, 2))
    expected = stats.ttest_rel([0.66, 0.74], [0.60, 0.70])
    interval = expected.confidence_interval(0.95)
    assert found.spread.mean == pytest.approx(0.05)
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))
    assert found.verdict == "no difference shown"


def test_a_verdict_needs_an_interval_on_one_side(write: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write(prompt=Plain(length=6), seed=seed, test=0.5 + seed / 100)
        write(seed=seed, test=0.6 + seed / 99)
    write(prompt=DPT(length=6, rank=1), test=0.9)
    found = {one.row: one.verdict for one in differences(tabled(tmp_path), "plain")}
    assert found == {"dpt rank=2": "better", "dpt rank=1": "one seed"}
    assert {one.row: one.verdict for one in differences(tabled(tmp_path), "dpt rank=2")}["plain"] == "worse"


@pytest.mark.parametrize("difference", [0.0, 0.01])
def test_equal_differences_show_nothing(difference: float, write: Write, tmp_path: Path) -> None:
    """One row of a hundred more in both seeds: without a spread Student's t would call it certain."""
    for seed in range(2):
        write(prompt=Plain(length=6), seed=seed, test=0.61 + seed / 10)
        write(seed=seed, test=0.61 + seed / 10 + difference)
    [found] = differences(tabled(tmp_path), "plain")
    assert (found.interval, found.verdict) == (None, "no spread")
    shown = tables.comparison([found], "plain").rows[0]
    assert (shown[3], shown[5]) == ("–", "no spread")


@pytest.mark.parametrize(("name", "said"), [("residual", "which is no row"), ("dpt", "which 2 rows are; give one of")])
def test_an_unclear_reference_is_refused(name: str, said: str, write: Write, tmp_path: Path) -> None:
    write()
    write(prompt=DPT(length=6, rank=1))
    with pytest.raises(ValueError, match=said):
        differences(tabled(tmp_path), name)


def test_settings_are_chosen_on_development_scores_alone(write: Write, tmp_path: Path) -> None:
    for lr, dev, test in ((0.01, 0.7, 0.55), (0.1, 0.6, 0.95)):
        write(training=TrainingConfig(steps=6, lr=lr), dev=dev, test=test)
    write(training=TrainingConfig(steps=6, lr=0.1, shots=8), dev=0.9, test=0.3)
    found = tabled(tmp_path, choose=True)
    cells = {cell["row"]: (cell["test"], cell["chosen"]) for cell in formats.cells(found)}
    # Shots are a condition: the two are not rivals.
    assert cells == {"dpt shots=0": (0.55, "lr=0.01, 1 of 2"), "dpt shots=8": (0.3, "lr=0.1")}


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert (spread.interval is None) == (statistics.stdev(values) <= 1e-12)
    if spread.interval is None:
        return
    assert spread.interval.low <= spread.mean + 1e-12
    assert spread.mean <= spread.interval.high + 1e-12
