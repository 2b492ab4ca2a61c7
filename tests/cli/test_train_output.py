"""The output of `softprompt train`, and the flags it refuses with --resume."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli import main
from softprompt.cli.terminal import Terminal
from softprompt.tasks import Score
from softprompt.training.callbacks import Progress

QUICK = ["--dtype", "float32", "--steps", "3", "--batch-size", "8", "--eval-steps", "3"]


def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


@pytest.fixture(scope="module")
def run(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs")
    code, lines, err = call(
        "train", "--backbone", llama_folder, "--task", ticket_task, "--out", out, *QUICK, "plain", "--length", "4"
    )
    assert code == 0, err
    assert any("macro_f1" in line and "accuracy" in line for line in err), "every metric asked for is in the table"
    return str(json.loads(lines[-1])["run"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--steps", "300"],
        ["--steps=300"],
        ["--lr", "0.03"],
        ["--seed", "0"],
        ["--out", "runs"],
        ["--name", "x"],
        ["--no-dropout"],
        ["--eval_steps", "50"],
        ["dpt"],
        ["plain", "--length", "100"],
    ],
)
def test_setting_with_resume_is_refused_even_at_default(run: str, flags: list[str]) -> None:
    code, out, err = call("train", "--resume", run, *flags)
    assert (code, out) == (1, [])
    assert flags[0].partition("=")[0].replace("_", "-") in err[-1]
    assert "--init-prompt" in err[-1]


def test_resuming_a_finished_run_prints_its_results(run: str) -> None:
    code, out, err = call("train", "--resume", run, "--show", "1", "--gradient-checkpointing", "--no-shard")
    assert code == 0
    assert json.loads(out[-1])["run"] == run
    assert "is finished after 3 steps" in " ".join(" ".join(err).split())


def texts(folder: Path, llama_folder: Path, answers: tuple[str, str]) -> list[str]:
    rows = "".join(f"{'fine' if number % 2 else 'poor'} film,{answers[number % 2]}\n" for number in range(40))
    (folder / "t.csv").write_text("text,answer\n" + rows)
    (folder / "t.toml").write_text('train = "t.csv"\ntemplate = "Review: {text}\\nVerdict:"\ntarget = "answer"\n')
    where = ["--backbone", llama_folder, "--task", folder / "t.toml", "--out", folder, "--max-new-tokens", "4"]
    code, out, err = call("train", *where, *QUICK, "plain", "--length", "4")
    assert code == 0, err
    return [json.loads(out[-1])["run"]]


def test_show_compares_texts_like_the_metric(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from softprompt.cli import train as command
    from softprompt.runs import open_run

    [folder] = texts(tmp_path, llama_folder, ("bad", "good"))
    trained = open_run(folder)
    lines = trained.predictions()
    for line in lines[:-1]:
        line["answer"] = f"The {line['gold'][0].upper()}!"  # right, except for case, article and punctuation
    lines[-1]["answer"] = "something else"
    monkeypatch.setattr(type(trained), "predictions", lambda self: lines)
    monkeypatch.setattr(command, "console", _Printer())
    command._show_mistakes(trained, 5)
    printed = capsys.readouterr().out
    assert "1 of 1 test rows answered wrongly" in printed
    assert printed.count("- row ") == 1
    assert "answered something else, correct is " in printed


class _Printer:
    def print(self, text: str, **_: Any) -> None:
        print(text)


def progress(step: int, dev: Score | None = None) -> Progress:
    return Progress(step=step, steps=200, loss=1.0, lr=0.1, rows_per_second=5.0, dev=dev)


def test_terminal_prints_first_step_and_each_score_once(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    score = Score(
        metric="accuracy",
        value=0.5,
        n=10,
        majority=0.5,
        majority_answer="a",
        majority_source="train",
        ci_low=0.2,
        ci_high=0.8,
    )
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        for step in range(1, 80):
            terminal.on_step(progress(step, score if step == 50 else None))
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("step 1/200")
    assert [line.split()[1] for line in lines if "accuracy" in line] == ["50/200"]
    assert any(line.startswith("step 75/200") and "left" in line for line in lines)
