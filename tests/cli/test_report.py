"""`softprompt report` as a user types it, on trained runs."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli import main
from softprompt.runs import open_run

QUICK = ["--dtype", "float32", "--steps", "4", "--batch-size", "8", "--eval-steps", "2"]


def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout and of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


@pytest.fixture(scope="module")
def trained(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, one of them with two seeds, and a run that is not finished."""
    out = tmp_path_factory.mktemp("runs")
    where = ["--backbone", llama_folder, "--task", ticket_task, "--out", out]
    for seed, method in (("0", "dpt"), ("1", "dpt"), ("0", "plain")):
        size = ["--length", "6", *(["--rank", "2"] if method == "dpt" else [])]
        code, _, err = call("train", *where, *QUICK, "--seed", seed, method, *size)
        assert code == 0, err
    record = json.loads((out / "tickets-plain-0" / "softprompt.json").read_text())
    (out / "stopped").mkdir()
    (out / "stopped" / "softprompt.json").write_text(json.dumps({**record, "results": None}))
    return out


@pytest.fixture(scope="module")
def reported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Path]:
    """The JSON line, stderr's lines, and the folder."""
    out = tmp_path_factory.mktemp("report")
    code, lines, err = call("report", trained, "--out", out, "--compare", "plain")
    assert code == 0, err
    return json.loads(lines[-1]), err, out


def test_json_line_holds_the_runs_results(reported: tuple[Any, list[str], Path], trained: Path) -> None:
    result, _, out = reported
    assert (result["command"], result["out"], result["runs"]) == ("report", str(out), 3)
    cells = {cell["method"]: cell for cell in result["cells"]}
    assert cells["dpt"]["seeds"] == [0, 1]
    runs = [open_run(trained / f"tickets-dpt-{seed}").results or {} for seed in (0, 1)]
    assert cells["dpt"]["test"] == pytest.approx(sum(run["test"] for run in runs) / 2)
    assert cells["dpt"]["trainable"] == runs[0]["trainable"]
    assert cells["plain"]["test_sd"] is None
    [skipped] = result["skipped"]
    assert skipped["folder"] == str(trained / "stopped")
    assert "softprompt train --resume" in skipped["reason"]
    assert [difference["seeds"] for difference in result["differences"]] == [[0]]


def test_report_writes_every_file(reported: tuple[Any, list[str], Path]) -> None:
    result, _, out = reported
    assert {Path(path).name for path in result["files"]} == {path.name for path in out.iterdir()}
    assert {path.name for path in out.iterdir()} == {
        "report.html", "results.txt", "results.md", "results.csv", "results.tex", "results.json",
        "learning-1.png", "learning-1.svg", "sizes.png", "sizes.svg",
    }  # fmt: skip


def test_tables_and_skipped_runs_are_printed(reported: tuple[Any, list[str], Path], trained: Path) -> None:
    _, lines, out = reported
    text = (out / "results.txt").read_text().splitlines()
    assert lines[: len(text)] == text
    assert any(line.startswith("majority answer") for line in lines)
    assert any(line.startswith(f"skipped: {trained / 'stopped'}: ") for line in lines)


@pytest.mark.parametrize(
    ("form", "name"), [("markdown", "results.md"), ("csv", "results.csv"), ("latex", "results.tex")]
)
def test_format_selects_the_printed_tables(form: str, name: str, trained: Path, tmp_path: Path) -> None:
    code, lines, err = call("report", trained / "tickets-plain-0", "--out", tmp_path / "out", "--format", form)
    assert code == 0
    assert json.loads(lines[-1])["runs"] == 1
    text = (tmp_path / "out" / name).read_text().splitlines()
    assert err[: len(text)] == text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["{runs}", "--compare", "lora"],
            "softprompt: compare is 'lora', which is not a row; give one of 'dpt', 'plain'",
        ),
        (["{runs}/stopped"], "softprompt: there is no finished run in"),
        ([], "softprompt: no folder is given; name runs, or folders that hold runs"),
    ],
)
def test_report_failure_is_one_sentence(arguments: list[str], sentence: str, trained: Path, tmp_path: Path) -> None:
    replaced = [argument.replace("{runs}", str(trained)) for argument in arguments]
    code, out, err = call("report", *replaced, "--out", tmp_path / "out")
    assert (code, out) == (1, [])
    assert err[-1].startswith(sentence)
    assert "Traceback" not in "".join(err)
    assert not (tmp_path / "out").exists()


def test_report_help_names_every_flag() -> None:
    code, out, _ = call("report", "--help")
    assert code == 0
    for word in ("RUNS", "--out", "--format", "--compare", "--choose", "--rates-on"):
        assert any(word in line for line in out), word
