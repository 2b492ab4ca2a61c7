"""`softprompt rank --gradient`: how few directions the loss's gradient has, for a backbone and along a run."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import Experiment, load_backbone, open_run
from softprompt.analysis.rank import GradientPoint, Spectrum, gradient_spectra
from softprompt.cli import main
from softprompt.evaluation.evaluate import read_splits
from softprompt.tasks.user import load_task
from softprompt.training.gradients import gradient_on

QUICK = ["--dtype", "float32", "--steps", "4", "--batch-size", "8", "--eval-steps", "2"]


def call(*arguments: str | Path) -> tuple[int, Any, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, json.loads(out.getvalue().splitlines()[-1]) if not code else None, " ".join(err.getvalue().split())


@pytest.fixture(scope="module")
def runs_of(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of an anchored prompt and of one that shifts the input."""
    out, found = tmp_path_factory.mktemp("runs"), {}
    where = ["train", "--backbone", llama_folder, "--task", ticket_task, "--out", out, *QUICK]
    for name, method in (("dpt", ["dpt", "--length", "6", "--rank", "2"]), ("dept", ["dept", "--length", "4"])):
        code, result, err = call(*where, "--name", name, *method)
        assert code == 0, err
        found[name] = Path(result["run"])
    return found


def test_energy_is_the_share_of_squared_values() -> None:
    point = GradientPoint(at="start", spectrum=Spectrum.of(torch.diag(torch.tensor([3.0, 2.0, 1.0]))))
    assert [point.energy(rank) for rank in (0, 1, 2, 3)] == pytest.approx([0, 9 / 14, 13 / 14, 1])


def test_gradient_at_start_checkpoints_and_end(runs_of: dict[str, Path], llama_folder: Path) -> None:
    code, result, err = call("rank", runs_of["dpt"], "--gradient", "--checkpoints", "--batches", "2")
    assert code == 0, err
    assert [point["at"] for point in result["gradients"]] == ["start", "step 2", "step 4", "finished"]
    run, backbone = open_run(runs_of["dpt"]), load_backbone(str(llama_folder), dtype="float32")
    gradient = gradient_on(run.experiment, run.task, backbone, read_splits(run.experiment, run.task).train)
    matrix = gradient(run.prompt(backbone).prompt().detach(), 2)
    assert result["gradients"][-1]["values"] == pytest.approx(torch.linalg.svdvals(matrix).tolist(), rel=1e-4)
    squares = torch.linalg.svdvals(matrix).square()
    assert result["gradients"][-1]["energy"]["2"] == pytest.approx(float(squares[:2].sum() / squares.sum()), rel=1e-4)


def test_gradient_of_a_sharded_run(runs_of: dict[str, Path], tmp_path: Path) -> None:
    """How the frozen layers were held in memory does not matter to the gradient."""
    shutil.copytree(runs_of["dpt"], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "softprompt.json").read_text())
    record["experiment"]["training"]["shard"] = True
    (tmp_path / "run" / "softprompt.json").write_text(json.dumps(record))
    code, result, err = call("rank", tmp_path / "run", "--gradient", "--batches", "1")
    assert code == 0, err
    assert [point["at"] for point in result["gradients"]] == ["start", "finished"]


def test_gradient_of_a_backbone_at_vocabulary_rows(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    code, result, err = call(
        *("rank", llama_folder, "--gradient", "--task", ticket_task, "--length", "5", "--batches", "1"),
        *("--out", tmp_path / "out"),
    )
    assert code == 0, err
    [point] = result["gradients"]
    assert (point["at"], len(point["values"]), list(point["energy"])) == ("start", 5, ["1", "2"])
    assert 0.2 < point["energy"]["1"] < point["energy"]["2"] < 1
    assert {Path(path).name for path in result["pictures"]} == {"gradient_energy.png", "gradient_energy.svg"}
    assert json.loads((tmp_path / "out/rank.json").read_text()) == result
    experiment = Experiment(backbone=str(llama_folder), task=str(ticket_task))
    assert load_task(experiment.task).name == "tickets"


@pytest.mark.parametrize(
    ("source", "flags", "sentence"),
    [
        ("dpt", ["--task", "boolq"], "is a run and has its own task and length; leave --task and --length out"),
        ("dpt", ["--length", "5"], "is a run and has its own task and length"),
        ("dept", [], "also changes the input's own embeddings, so its matrix alone has no gradient"),
        ("dpt", ["--functional"], "--gradient goes with --task, --data, --length, --batches, --checkpoints and --out"),
        ("dpt", ["--rows", "5"], "--gradient goes with --task, --data, --length, --batches, --checkpoints and --out"),
        ("dpt", ["--batches", "0"], "batches is 0; it must be at least 1"),
        (
            "backbone",
            [],
            "is not a run, so it is taken for a backbone, and a gradient is of a task's loss; say which with --task",
        ),
        ("backbone", ["--task", "boolq", "--checkpoints"], "is a backbone and has no checkpoints"),
    ],
)
def test_gradient_refuses_settings_that_do_not_fit(
    source: str, flags: list[str], sentence: str, runs_of: dict[str, Path], llama_folder: Path
) -> None:
    code, _, err = call("rank", runs_of.get(source, llama_folder), "--gradient", *flags)
    assert code == 1
    assert sentence in err


@pytest.mark.parametrize("flags", [["--length", "5"], ["--batches", "3"]])
def test_gradient_flags_refused_without_gradient(flags: list[str], runs_of: dict[str, Path]) -> None:
    code, _, err = call("rank", runs_of["dpt"], *flags)
    assert code == 1
    assert "--length and --batches do nothing without --gradient" in err


def test_gradient_refuses_a_run_with_a_head(tiny_backbone: Any, ticket_task: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_backbone("bert").model.save_pretrained(folder)
    tiny_backbone("bert").tokenizer.save_pretrained(folder)
    code, result, err = call(
        *("train", "--backbone", folder, "--task", ticket_task, "--out", tmp_path, *QUICK),
        *("dpt", "--length", "6", "--rank", "2"),
    )
    assert code == 0, err
    with pytest.raises(ValueError, match="was trained with a head, which changes along the run"):
        gradient_spectra(result["run"])
