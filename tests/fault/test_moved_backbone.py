"""A backbone whose folder was moved after training, and incomplete files of other software."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt import DPT, Experiment, Run, TrainingConfig, evaluate, load_backbone, predict, runs, train
from softprompt.analysis.rank import Truncation, measure
from softprompt.cli import main
from softprompt.export import read_dept


@pytest.fixture(scope="module")
def moved(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run, and the current path of its backbone."""
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(llama_folder, models / "before")
    experiment = Experiment(
        backbone=str(models / "before"),
        task=str(ticket_task),
        prompt=DPT(length=4, rank=2),
        training=TrainingConfig(steps=2, batch_size=8, eval_steps=2),
        dtype="float32",
    )
    run = train(experiment, out=tmp_path_factory.mktemp("runs"), name="run")
    (models / "before").rename(models / "now")
    return run, models / "now"


@pytest.fixture
def other(moved: tuple[Run, Path], tmp_path: Path) -> Path:
    """A model of the same shape in which one tensor differs."""
    shutil.copytree(moved[1], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]] += 1
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "other"


def command(name: str, run: Run, rows: Path, out: Path) -> list[str]:
    flags = {
        "predict": ["--input", str(rows)],
        "evaluate": [],
        "export": ["--to", "npz", "--output", str(out)],
        "rank": [],
    }
    return [name, str(run.folder), *flags[name]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a a b"}\n')
    return tmp_path / "rows.jsonl"


COMMANDS = ("predict", "evaluate", "export", "rank")


@pytest.mark.parametrize("name", COMMANDS)
def test_command_takes_the_backbones_new_path(
    name: str, moved: tuple[Run, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new_path = moved
    assert main([*command(name, run, rows, tmp_path / "out"), "--backbone", str(new_path)]) == 0, (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_command_refuses_other_weights(
    name: str, moved: tuple[Run, Path], other: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(name, moved[0], rows, tmp_path / "out"), "--backbone", str(other)]) == 1
    assert f"the weights of {other} are not those that run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_backbone_names_its_recorded_path(
    name: str, moved: tuple[Run, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, new_path = moved
    assert main(command(name, run, rows, tmp_path / "out")) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert f"recorded the backbone {new_path.with_name('before')}, which cannot be loaded" in printed
    assert "give its current path with --backbone" in printed


def test_moved_backbone_is_loaded_in_the_runs_dtype(moved: tuple[Run, Path], other: Path) -> None:
    run, new_path = moved
    assert run.load_backbone(str(new_path)).precision == "float32"
    with pytest.raises(ValueError, match="are not those that run"):
        run.load_backbone(str(other))


def test_functions_take_a_path_or_a_loaded_backbone(moved: tuple[Run, Path]) -> None:
    run, new_path = moved
    loaded = load_backbone(str(new_path), dtype="float32")
    by_path, by_model = (predict(run, [{"text": "a a b"}], backbone=source) for source in (str(new_path), loaded))
    assert by_path == by_model
    assert evaluate(run, backbone=str(new_path)) == evaluate(run, backbone=loaded)
    [measured] = measure(run.folder, functional=Truncation(backbone=str(new_path), rows=8, ranks=(1,)))
    assert measured.functional is not None


def test_export_records_the_new_path(moved: tuple[Run, Path], tmp_path: Path) -> None:
    run, new_path = moved
    assert main(["export", str(run.folder), "--output", str(tmp_path / "out"), "--backbone", str(new_path)]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        new_path
    )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_adapter_is_not_advised_to_retrain(
    damage: Callable[[Path], object], moved: tuple[Run, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {"prompt_embeddings": torch.zeros(4, 32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING_LORA", "lora_alpha": 8}))
    damage(folder / "adapter_model.safetensors")
    backbone = load_backbone(str(moved[1]), dtype="float32")
    for read in (lambda: runs.read_prompt(folder, backbone), lambda: read_dept(folder)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"adapter_model\.safetensors") as caught:
            read()
        assert "train again" not in str(caught.value)


def test_truncated_run_file_says_what_to_do(moved: tuple[Run, Path], tmp_path: Path) -> None:
    run, new_path = moved
    shutil.copytree(run.folder, tmp_path / "run")
    cut(tmp_path / "run" / runs.TENSORS)
    with pytest.raises(ValueError, match=r"softprompt\.safetensors is not a complete .*copy its folder again"):
        runs.open_run(tmp_path / "run").prompt(load_backbone(str(new_path), dtype="float32"))
