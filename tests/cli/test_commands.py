"""Every command as a user types it: exit code, a JSON line at the end of stdout, one sentence on failure."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from called import call

import softprompt.cli
from softprompt import __version__
from softprompt.assets import ASSETS
from softprompt.cli import COMMANDS, main
from softprompt.prompts import METHODS
from softprompt.tasks import TASKS

KRONECKER = Path(__file__).with_name("kronecker.py")
QUICK = ["--dtype", "float32", "--steps", "3", "--batch-size", "8", "--eval-steps", "3"]
LABELS = {"Billing", "Sales", "Returns", "Login", "Delivery", "Other"}


@pytest.fixture(scope="module")
def where(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("runs")
    return ["--backbone", str(llama_folder), "--task", str(ticket_task), "--out", str(out)]


@pytest.fixture(scope="module")
def trained(where: list[str]) -> Any:
    """The JSON line of a training."""
    return call("train", *where, *QUICK, "--name", "mine", "dpt", "--length", "6", "--rank", "2").result


def test_train_reports_the_run(trained: Any, where: list[str], llama_folder: Path) -> None:
    assert (
        trained.items()
        >= {
            "command": "train",
            "run": str(Path(where[-1]) / "mine"),
            "method": "dpt",
            "trainable": METHODS["dpt"](length=6, rank=2).count(32),
            "task": "tickets",
            "backbone": str(llama_folder),
            "steps": 3,
            "seed": 0,
            "metric": "accuracy",
            "n_test": 24,
            "majority": pytest.approx(1 / 6),
        }.items()
    )
    assert 0 <= trained["dev"] <= 1
    assert 0 <= trained["ci_low"] <= trained["test"] <= trained["ci_high"] <= 1
    assert trained["seconds"] > 0
    assert {"softprompt.json", "README.md", "metrics.jsonl"} <= {file.name for file in Path(trained["run"]).iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_train_every_method(method: str, where: list[str]) -> None:
    result = call("train", *where, *QUICK, "--zero-shot", "--show", "2", method).result
    assert (result["method"], result["trainable"]) == (method, METHODS[method]().count(32))
    assert 0 <= result["zero_shot"] <= 1


def test_default_method_is_dpt(where: list[str]) -> None:
    assert call("train", *where, *QUICK).result["method"] == "dpt"


def test_settings_reach_the_run(where: list[str]) -> None:
    expected = {
        "vocabulary_weight": 1.0,
        "lr_scheduler": "cosine",
        "gradient_accumulation_steps": 2,
        "shots": 4,
        "lr": 0.01,
    }
    flags = [part for name, value in expected.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    method = ["plain", "--length", "9", "--init", "label_words"]
    run = call("train", *where, *QUICK, *flags, "--seed", "5", *method).result["run"]
    experiment = json.loads((Path(run) / "softprompt.json").read_text())["experiment"]
    assert experiment["seed"] == 5
    assert experiment["training"].items() >= {**expected, "steps": 3}.items()
    assert experiment["prompt"].items() >= {"method": "plain", "length": 9, "init": "label_words"}.items()


def test_train_notes_a_small_fault_in_the_rows(where: list[str]) -> None:
    called = call("train", *where, *QUICK, "--max-input-tokens", "9", "dpt", "--length", "6", "--rank", "2")
    assert called.result["steps"] == 3
    assert any("train rows were cut to 9 tokens (--max-input-tokens)" in line for line in called.err.splitlines())


def test_evaluate_repeats_the_runs_score(trained: Any, ticket_task: Path) -> None:
    result = call("evaluate", trained["run"]).result
    assert (result["metric"], result["value"], result["n"]) == ("accuracy", trained["test"], 24)
    assert (result["majority"], result["ci_low"], result["ci_high"]) == (
        trained["majority"],
        trained["ci_low"],
        trained["ci_high"],
    )
    assert call("evaluate", trained["run"], "--split", "dev").result["value"] == trained["dev"]
    again = call("evaluate", trained["run"], "--task", ticket_task).result
    assert (again["task"], again["value"]) == (str(ticket_task), trained["test"])


def test_predict_prints_a_line_per_row(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\na a a\nb b\n")
    printed = call("predict", trained["run"], "--input", tmp_path / "rows.csv")
    assert printed.code == 0
    answers = [json.loads(line) for line in printed.out]
    assert [answer["row"] for answer in answers] == [1, 2]
    for answer in answers:
        assert answer["probabilities"].keys() == LABELS
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["answer"] == max(LABELS, key=answer["probabilities"].__getitem__)
    written = call("predict", trained["run"], "--input", tmp_path / "rows.csv", "--output", tmp_path / "answers.jsonl")
    output = str(tmp_path / "answers.jsonl")
    assert written.result == {"command": "predict", "run": trained["run"], "rows": 2, "output": output}
    assert len(written.out) == 1
    assert (tmp_path / "answers.jsonl").read_text().splitlines() == printed.out


def test_predict_names_a_missing_column(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("texts\na a a\n")
    assert "text" in call("predict", trained["run"], "--input", tmp_path / "rows.csv").sentence


def test_export_writes_a_peft_folder(trained: Any, tmp_path: Path) -> None:
    result = call("export", trained["run"], "--output", tmp_path / "adapter").result
    expected = {"command": "export", "runs": [trained["run"]], "to": "peft", "output": str(tmp_path / "adapter")}
    compared = {name: result.pop(name) for name in ("largest_difference", "tolerance", "unit")}
    assert compared["largest_difference"] == compared["tolerance"] == 0
    assert compared["unit"]
    assert result == {**expected, "prompts": {"mine": 6}}
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == names
    for name in names:
        assert (tmp_path / "adapter" / name).read_bytes() == (Path(trained["run"]) / name).read_bytes()
    assert "never overwritten" in call("export", trained["run"], "--output", tmp_path / "adapter").sentence


def test_list_of_each_kind(trained: Any, where: list[str]) -> None:
    methods = call("list", "methods", "--dim", "768").result
    expected = [{"name": name, "count": METHODS[name]().count(768), "folds": METHODS[name].folds} for name in METHODS]
    assert methods == sorted(expected, key=lambda method: method["name"])
    assert {"name": "dpt", "count": 7880, "folds": "prompt"} in methods
    assert {task["name"] for task in call("list", "tasks").result} == set(TASKS)
    assert {asset["name"] for asset in call("list", "assets").result} == set(ASSETS)
    [mine] = [run for run in call("list", "runs", "--out", where[-1]).result if run["name"] == "mine"]
    assert mine.items() >= {"method": "dpt", "test": trained["test"], "finished": True}.items()
    assert call("list", "runs", "--out", where[-1] + "-none").result == []


def test_doctor_reports_versions() -> None:
    result = call("doctor").result
    assert result["versions"].items() >= {"softprompt": __version__}.items()
    assert result["dtype"] in ("float32", "bfloat16")
    assert result["assets"].keys() == ASSETS.keys()
    assert result["threads"] >= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fetch", "nothing"], ["'nothing'"]),
        (["train", "--task", "sentimant"], ["'sentimant'", "sentiment"]),
        (["train", "--task", "missing.toml"], ["missing.toml"]),
        (["list", "methods", "--prompt-module", "missing.py"], ["'missing.py' is not a Python file"]),
        (["list", "methods", "--prompt-module"], ["is not a Python file"]),
    ],
)
def test_missing_input_is_one_sentence(arguments: list[str], words: list[str]) -> None:
    sentence = call(*arguments).sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--name", "a/b"], ["'a/b' is not a plain folder name"]),
        (["--data", "missing.csv"], ["missing.csv"]),
        (["dpt", "--length", "50", "--rank", "40"], ["rank is 40", "32 wide"]),
        (["plain", "--length", "300"], ["positions", "256"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    flags: list[str], words: list[str], where: list[str], tmp_path: Path
) -> None:
    sentence = call("train", *where[:-1], tmp_path / "runs", *QUICK, *flags).sentence
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--lr", "-1"], "lr is -1.0; it must be a positive number"),
        (["--gradient-accumulation-steps", "99"], "gradient_accumulation_steps is 99 and batch_size 16"),
        (["dpt", "--rank", "7", "--length", "6"], "rank is 7 and length is 6; a prompt's rank cannot exceed"),
    ],
)
def test_invalid_settings_exit_2(flags: list[str], sentence: str, tmp_path: Path) -> None:
    called = call("train", "--out", tmp_path / "runs", *flags)
    assert (called.code, called.out) == (2, [])
    assert sentence in " ".join(called.err.split())  # in a box, wrapped to the terminal's width
    assert not (tmp_path / "runs").exists()


def test_missing_backbone_is_one_sentence(where: list[str]) -> None:
    sentence = call("train", "--backbone", "no-such-model", *where[2:], *QUICK).sentence
    assert "backbone 'no-such-model' is neither a folder" in sentence


def test_wrong_usage_exits_2() -> None:
    for arguments in (["train", "--stepz", "3"], ["train", "--steps", "many"], ["list", "colors"], ["evaluate"]):
        called = call(*arguments)
        assert called.code == 2, arguments
        assert called.out == []
    for command, hint in (("trian", "did you mean 'train'?"), ("colors", f"commands are {', '.join(COMMANDS)}")):
        called = call(command)
        assert (called.code, called.out) == (2, [])
        assert called.err == f"softprompt: no command {command!r}; {hint}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    called = call(command, "--help")
    assert called.code == 0
    assert COMMANDS[command].split()[0] in "\n".join([*called.out, called.err])


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("evaluate", r"The weights that generation reads .* else original\."),  # an argument of a function
        ("train", r"A text file to distil .* the teacher's distribution without it\."),  # a field
    ],
)
def test_help_breaks_no_line_within_a_text(command: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    assert re.search(sentence, "\n".join(call(command, "--help").out))  # the dots match no line break


def test_help_and_version() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        called = call(*arguments)
        assert called.code == 0
        assert all(any(line.startswith(f"  {command} ") for line in called.out) for command in COMMANDS)
    assert call("--version").out == [__version__]


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["evaluate", "nowhere", "--debug"])


def test_resume_refuses_settings(trained: Any) -> None:
    sentence = call("train", "--resume", trained["run"], "--steps", "9").sentence
    assert "--steps is given with --resume" in sentence
    assert "keeps its own settings" in sentence
    assert call("train", "--resume", trained["run"]).result == trained


@pytest.fixture
def own_method(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets the method of one's own, as a new process would."""

    def forget() -> None:
        METHODS.pop("kronecker", None)
        monkeypatch.delitem(sys.modules, "kronecker", raising=False)
        monkeypatch.delitem(sys.modules, "softprompt.cli.train", raising=False)  # it builds its flags of METHODS
        monkeypatch.delattr(softprompt.cli, "commands", raising=False)

    return forget


def test_prompt_module_adds_a_method(where: list[str], own_method: Callable[[], None], tmp_path: Path) -> None:
    flag = ["--prompt-module", str(KRONECKER)]
    own_method()
    try:
        listed = call("list", "methods", "--dim", "32", *flag).result
        assert {"name": "kronecker", "count": 4 * 4 + 25 * 8, "folds": "prompt"} in listed
        own_method()
        assert "kronecker" not in {method["name"] for method in call("list", "methods").result}
        own_method()
        result = call("train", f"--prompt-module={KRONECKER}", *where, *QUICK, "kronecker", "--length", "8").result
        assert (result["method"], result["trainable"]) == ("kronecker", 4 * 4 + 2 * 8)
        own_method()
        sentence = call("evaluate", result["run"]).sentence
        assert "'kronecker'" in sentence
        assert "--prompt-module" in sentence
        own_method()
        assert call("evaluate", result["run"], *flag).result["value"] == result["test"]
        assert call("export", result["run"], *flag, "--output", tmp_path / "adapter").result["to"] == "peft"
    finally:
        own_method()


def test_program_as_a_process(where: list[str]) -> None:
    """In a process of its own: progress on stderr alone, the JSON line alone on stdout, a traceback with --debug."""

    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "softprompt.cli", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = program("train", *where, *QUICK, f"--prompt-module={KRONECKER}", "kronecker", "--length", "8")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert json.loads(line)["method"] == "kronecker"
    assert "training ..." in done.stderr
    assert "Traceback" not in done.stderr
    failed = program("evaluate", "nowhere", "--debug")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize("arguments", [("list", "tasks"), ("train", "--help")])
def test_closed_stdout_is_no_error(arguments: tuple[str, ...]) -> None:
    """As in `softprompt list tasks | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "softprompt.cli", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 0, done.stderr
    assert "Broken" not in done.stderr
