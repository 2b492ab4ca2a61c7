"""Reports: only runs that differ in the seed are averaged, and every score has its interval and majority."""

import json
import math
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from softprompt import DPT, Plain, TrainingConfig
from softprompt.analysis.report import Report, formats, report, tables
from softprompt.analysis.report.compare import differences
from softprompt.analysis.report.grid import Grid, arrange, best_by
from softprompt.analysis.report.groups import group
from softprompt.analysis.report.read import read
from softprompt.analysis.report.statistics import Spread

DIM = 32
Write = Callable[..., Path]


def make_report(tmp_path: Path, **options: Any) -> Report:
    return report([tmp_path / "runs"], out=tmp_path / "out", **options)


def make_grid(tmp_path: Path, *, choose: bool = False) -> Grid:
    """The grid alone: plots take seconds."""
    return arrange(group(read([tmp_path / "runs"])[0])[0], choose=choose)


def test_cell_is_the_mean_over_seeds_with_intervals(write: Write, tmp_path: Path) -> None:
    scores = [0.61, 0.66, 0.58]
    for seed, score in enumerate(scores):
        write(test=score, seed=seed)
    [cell] = formats.cells(make_grid(tmp_path))
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
    [cell] = formats.cells(make_grid(tmp_path))
    assert cell["test_sd"] is cell["test_seeds_interval"] is None
    assert "±" not in tables.scores(make_grid(tmp_path)).rows[-1][1]


@pytest.mark.parametrize(
    ("majority", "against_majority", "mark"),
    [(0.40, "above", ""), (0.549, "above", ""), (0.56, "within", "†"), (0.64, "within", "†"), (0.70, "below", "‡")],
)
def test_score_is_marked_against_the_majority(
    majority: float, against_majority: str, mark: str, write: Write, tmp_path: Path
) -> None:
    write(test=0.6, majority=majority)
    grid = make_grid(tmp_path)
    assert formats.cells(grid)[0]["against_majority"] == against_majority
    cell = tables.scores(grid).rows[-1][1].splitlines()[0]
    assert cell == f"60.0 (1){mark}"
    assert (
        any(note.startswith(mark) for note in tables.scores(grid).notes)
        if mark
        else "†" not in str(tables.scores(grid))
    )


def test_majority_within_either_interval_is_within(write: Write, tmp_path: Path) -> None:
    """Wide over seeds, narrow over rows."""
    for seed, score in enumerate((0.55, 0.75)):
        write(test=score, seed=seed, ci_low=score - 0.01, ci_high=score + 0.01, majority=0.5)
    assert formats.cells(make_grid(tmp_path))[0]["against_majority"] == "within"


def test_selection_warning_is_marked_and_noted(write: Write, tmp_path: Path) -> None:
    write(selection_warning="selected and reported on the same rows", fields={"protocol": "paper"})
    grid = make_grid(tmp_path)
    assert tables.scores(grid).rows[-1][1].splitlines()[0].endswith("§")
    assert any("same rows" in note for note in tables.scores(grid).notes)


@pytest.mark.parametrize(("warning", "noted"), [(None, False), ("all 100 rows got one answer, 'a'", True)])
def test_report_notes_only_runs_with_a_warning(warning: str | None, noted: bool, write: Write, tmp_path: Path) -> None:
    """A record without a warning holds null, as `train` writes it."""
    write(warning=warning)
    notes = tables.scores(make_grid(tmp_path)).notes
    assert any(note.startswith("Check ") for note in notes) == noted


def _unfinished(folder: Path) -> None:
    record = json.loads((folder / "softprompt.json").read_text())
    (folder / "softprompt.json").write_text(json.dumps({**record, "results": None}))


def _results(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "softprompt.json").read_text())
        record["results"] |= changes
        (folder / "softprompt.json").write_text(json.dumps(record))

    return change


def _training(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "softprompt.json").read_text())
        record["experiment"]["training"] |= changes
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
    "infinite result": (_results(note=math.inf), "infinite or NaN"),
    "infinite setting": (_training(max_grad_norm=math.inf), "max_grad_norm is inf"),
    "text": (_results(majority="half"), "'majority' is 'half'"),
    "true": (_results(ci_low=True), "'ci_low' is True"),
    "huge": (_results(test=10**400), "too large"),
    "nothing trained": (_results(trainable=0), "no trainable parameters"),
    "extra_metrics": (_results(extra_metrics={"f1": None}), "'f1' is None"),
    "distillation": (_results(distillation={"prompt": {"kl": 1}}), "'context_tokens' is None"),
    "binary": (lambda folder: (folder / "softprompt.json").write_bytes(b"\xff\xfe\x00"), "not readable"),
    "bad results": (
        lambda folder: (folder / "softprompt.json").write_text(
            re.sub(r'"results": {.*}', '"results": 3}', (folder / "softprompt.json").read_text())
        ),
        "results are int",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_unreadable_run_is_skipped_with_the_reason(name: str, write: Write, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    write("good")
    damage(write("bad", seed=1))
    results, [skipped] = read([tmp_path])
    assert [result.name for result in results] == ["good"]
    assert skipped.folder.endswith("bad")
    assert reason in skipped.reason
    shutil.rmtree(tmp_path / "runs" / "good")
    with pytest.raises(ValueError, match=r"there is no finished run in .*bad: "):
        make_report(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tail", ['{"step": 7, "lo', "[1]\n", '{"step": 2, "loss": 1}\n', '{"step": 7, "loss": NaN}\n'])
def test_curve_ends_at_the_first_damaged_line(tail: str, write: Write, tmp_path: Path) -> None:
    folder = write()
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(tail + '{"step": 9, "loss": 1}\n')
    [result] = read([tmp_path])[0]
    assert [point.step for point in result.curve] == [1, 2, 3, 4, 5, 6]


def test_find_skips_hidden_folders_and_runs_in_runs(write: Write, tmp_path: Path) -> None:
    inner = write("group-of-runs/run", seed=0)
    shutil.copytree(inner, inner / "checkpoints" / "copy")
    shutil.copytree(inner, tmp_path / "runs" / ".draft")
    assert [Path(result.run.folder) for result in read([tmp_path])[0]] == [inner]
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        read(["nowhere"])


def test_trials_of_a_search_are_read_only_on_request(write: Write, tmp_path: Path) -> None:
    final = write("final")
    trial = write("search/study/trial", training=TrainingConfig(steps=6, lr=0.5))
    (trial.parent / "study.journal").write_text("{}\n")
    results, [skipped] = read([tmp_path])
    assert [result.run.folder for result in results] == [final]
    assert skipped.folder == str(trial.parent)
    assert skipped.reason == (
        "it holds the trials of a search, which selected settings; give this folder itself to see them"
    )
    for folder in (trial.parent, trial.parent.parent, trial):
        results, nothing_skipped = read([folder])
        assert ([result.run.folder for result in results], nothing_skipped) == ([trial], [])


def test_report_refuses_a_run_as_out(write: Write) -> None:
    folder = write()
    with pytest.raises(ValueError, match="is a run"):
        report([folder], out=folder)


def test_report_replaces_the_last_one(write: Write, tmp_path: Path) -> None:
    """Of an earlier report with more plots nothing stays, and other files in its folder do."""
    write()
    first = {path.name: path.read_bytes() for path in make_report(tmp_path).files}
    cb, slow = write(task="cb", test=0.9), write(test=0.2, training=TrainingConfig(steps=6, lr=0.5))
    more = {path.name: path.read_bytes() for path in make_report(tmp_path).files}
    plots = {f"{name}.{kind}" for name in ("learning-2", "rates-dev") for kind in ("png", "svg")}
    assert set(more) - set(first) == plots
    assert more["results.txt"] != first["results.txt"]
    (tmp_path / "out" / "learning-3.png").write_text("the user's own")
    for folder in (cb, slow):
        shutil.rmtree(folder)
    assert {path.name: path.read_bytes() for path in make_report(tmp_path).files} == first
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*first, "learning-3.png"}


def test_report_without_the_extra_is_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        make_report(tmp_path)


# Differences


def test_differences_are_paired_by_seed(write: Write, tmp_path: Path) -> None:
    base, other = {0: 0.50, 1: 0.60, 2: 0.70}, {1: 0.66, 2: 0.74, 3: 0.10}
    for seed, score in base.items():
        write(prompt=Plain(length=6), seed=seed, test=score)
    for seed, score in other.items():
        write(seed=seed, test=score)
    [result] = differences(make_grid(tmp_path), "plain")
    assert (result.row, result.seeds) == ("dpt", (1, 2))
    expected = stats.ttest_rel([0.66, 0.74], [0.60, 0.70])
    interval = expected.confidence_interval(0.95)
    assert result.spread.mean == pytest.approx(0.05)
    assert result.interval is not None
    assert (result.interval.low, result.interval.high) == pytest.approx((interval.low, interval.high))
    assert result.verdict == "no significant difference"


def test_verdict_needs_an_interval_on_one_side_of_zero(write: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write(prompt=Plain(length=6), seed=seed, test=0.5 + seed / 100)
        write(seed=seed, test=0.6 + seed / 99)
    write(prompt=DPT(length=6, rank=1), test=0.9)
    verdicts = {difference.row: difference.verdict for difference in differences(make_grid(tmp_path), "plain")}
    assert verdicts == {"dpt rank=2": "better", "dpt rank=1": "one seed"}
    reverse = {difference.row: difference.verdict for difference in differences(make_grid(tmp_path), "dpt rank=2")}
    assert reverse["plain"] == "worse"


@pytest.mark.parametrize("difference", [0.0, 0.01])
def test_equal_differences_have_no_spread(difference: float, write: Write, tmp_path: Path) -> None:
    """One row of a hundred more in both seeds: without a spread Student's t would call it certain."""
    for seed in range(2):
        write(prompt=Plain(length=6), seed=seed, test=0.61 + seed / 10)
        write(seed=seed, test=0.61 + seed / 10 + difference)
    [result] = differences(make_grid(tmp_path), "plain")
    assert (result.interval, result.verdict) == (None, "no spread")
    row = tables.comparison([result], "plain").rows[0]
    assert (row[3], row[5]) == ("–", "no spread")


@pytest.mark.parametrize(
    ("name", "sentence"), [("residual", "which is not a row"), ("dpt", "a method with 2 rows; give one of")]
)
def test_ambiguous_reference_is_refused(name: str, sentence: str, write: Write, tmp_path: Path) -> None:
    write()
    write(prompt=DPT(length=6, rank=1))
    with pytest.raises(ValueError, match=sentence):
        differences(make_grid(tmp_path), name)


def test_choose_uses_only_development_scores(write: Write, tmp_path: Path) -> None:
    for lr, dev, test in ((0.01, 0.7, 0.55), (0.1, 0.6, 0.95)):
        write(training=TrainingConfig(steps=6, lr=lr), dev=dev, test=test)
    write(training=TrainingConfig(steps=6, lr=0.1, shots=8), dev=0.9, test=0.3)
    grid = make_grid(tmp_path, choose=True)
    cells = {cell["row"]: (cell["test"], cell["best_settings"]) for cell in formats.cells(grid)}
    # Shots are a condition, so both are kept.
    assert cells == {"dpt shots=0": (0.55, "lr=0.01, 1 of 2"), "dpt shots=8": (0.3, "lr=0.1")}


def test_choose_passes_over_a_setting_that_lacks_seeds(write: Write, tmp_path: Path) -> None:
    """Of the higher rate two seeds diverged, and the third was lucky."""
    for seed, dev in enumerate((0.8, 0.78, 0.82)):
        write(training=TrainingConfig(steps=6, lr=0.03), dev=dev, seed=seed)
    write(training=TrainingConfig(steps=6, lr=0.3), dev=0.83)
    [cell] = formats.cells(make_grid(tmp_path, choose=True))
    assert cell["best_settings"] == "lr=0.03, 1 of 2 (1 with fewer seeds)"


def test_best_of_equals_is_the_smaller_prompt(write: Write, tmp_path: Path) -> None:
    for rank in (3, 1, 2):
        write(prompt=DPT(length=6, rank=rank))
    groups = [group for _, group in make_grid(tmp_path).of_column("rte")]
    assert [group.settings["rank"] for group in best_by(groups, lambda group: group.method)] == [1]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_interval_contains_its_mean(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert (spread.interval is None) == (statistics.stdev(values) <= 1e-12)
    if spread.interval is None:
        return
    assert spread.interval.low <= spread.mean + 1e-12
    assert spread.mean <= spread.interval.high + 1e-12


def test_distilled_prompts_have_a_table_beside_their_teacher(write: Write, tmp_path: Path) -> None:
    for seed in range(2):
        models = {"teacher": (0.0, 1.0, 0.9), "prompt": (0.1 + 0.1 * seed, 0.8, 0.85), "no_context": (1.0, 0.5, 0.6)}
        distillation: dict[str, Any] = {"context_tokens": 600, "prompt_tokens": 20}
        for name, values in models.items():
            distillation[name] = dict(zip(("kl", "agreement", "score"), values, strict=True))
        write(seed=seed, distillation=distillation)
    table = tables.distillation(make_grid(tmp_path))
    assert table is not None
    assert [row[2:] for row in table.rows] == [
        ("the whole context (teacher)", "600", "0.000", "100.0", "90.0", "2"),
        ("the distilled prompt", "20", "0.150", "80.0", "85.0", "2"),
        ("no context", "0", "1.000", "50.0", "60.0", "2"),
    ]
    [cell] = formats.cells(make_grid(tmp_path))
    assert cell["runs"][1]["distillation"]["prompt"]["kl"] == 0.2
    made = make_report(tmp_path)
    assert "the distilled prompt" in (tmp_path / "out" / "report.html").read_text()
    assert "Distillation" in made.render("markdown")


def test_runs_without_a_teacher_have_no_distillation_table(write: Write, tmp_path: Path) -> None:
    write()
    assert tables.distillation(make_grid(tmp_path)) is None


def test_seeds_scored_on_other_rows_are_not_compared(write: Write, tmp_path: Path) -> None:
    for seed in range(3):
        write(test=0.6, seed=seed)
        write(test=0.7 + 0.01 * seed, seed=seed, prompt=Plain(length=6), n_test=100 if seed else 30)
    [difference] = differences(make_grid(tmp_path), "dpt")
    assert (difference.seeds, difference.other_rows) == ((1, 2), (0,))
    assert difference.mean == pytest.approx(0.115)
    assert (
        "other test rows than the reference: seeds of plain on rte" in tables.comparison([difference], "dpt").notes[-1]
    )


def test_other_training_rows_are_compared_on_equal_test_rows(write: Write, tmp_path: Path) -> None:
    """Few-shot against all rows, for one."""
    write(test=0.6)
    write(test=0.7, data={"splits": "few-shot"}, training=TrainingConfig(steps=6, shots=4))
    [difference] = differences(make_grid(tmp_path), "dpt shots=0")
    assert (difference.mean, difference.seeds) == (pytest.approx(0.1), (0,))


def test_no_seed_with_the_same_rows_has_no_difference(write: Write, tmp_path: Path) -> None:
    write(test=0.6)
    write(test=0.7, prompt=Plain(length=6), data={"test": "other rows"})
    [difference] = differences(make_grid(tmp_path), "dpt")
    assert (difference.mean, difference.verdict) == (None, "other rows")
    assert tables.comparison([difference], "dpt").rows[0][2] == ""
