"""A model's folder that lies elsewhere than where a run was trained, and files that other software left incomplete."""

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
    """A run, and the place where its backbone lies now."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(llama_folder, place / "before")
    experiment = Experiment(
        backbone=str(place / "before"),
        task=str(ticket_task),
        prompt=DPT(length=4, rank=2),
        training=TrainingConfig(steps=2, batch_size=8, eval_steps=2),
        dtype="float32",
    )
    run = train(experiment, out=tmp_path_factory.mktemp("runs"), name="run")
    (place / "before").rename(place / "now")
    return run, place / "now"


@pytest.fixture
def other(moved: tuple[Run, Path], tmp_path: Path) -> Path:
    """A model of the same shape with one other weight."""
    shutil.copytree(moved[1], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors[sorted(tensors)[0]] += 1
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "other"


def command(name: str, run: Run, rows: Path, out: Path) -> list[str]:
    more = {
        "predict": ["--input", str(rows)],
        "evaluate": [],
        "export": ["--to", "npz", "--output", str(out)],
        "rank": [],
    }
    return [name, str(run.folder), *more[name]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a a b"}\n')
    return tmp_path / "rows.jsonl"


COMMANDS = ("predict", "evaluate", "export", "rank")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_place_where_it_lies_now(
    name: str, moved: tuple[Run, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, now = moved
    assert main([*command(name, run, rows, tmp_path / "out"), "--backbone", str(now)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_other_weights_are_refused(
    name: str, moved: tuple[Run, Path], other: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(name, moved[0], rows, tmp_path / "out"), "--backbone", str(other)]) == 1
    assert f"the weights of {other} are not those that run" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_without_the_flag_its_recorded_place_is_told(
    name: str, moved: tuple[Run, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, now = moved
    assert main(command(name, run, rows, tmp_path / "out")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"recorded the backbone {now.with_name('before')}, which cannot be loaded" in said
    assert "give that place with --backbone" in said


def test_the_dtype_is_the_runs_so_that_other_weights_are_told_apart(moved: tuple[Run, Path], other: Path) -> None:
    run, now = moved
    assert run.backbone(str(now)).precision == "float32"
    with pytest.raises(ValueError, match="are not those that run"):
        run.backbone(str(other))


def test_the_library_takes_a_place_or_a_loaded_backbone(moved: tuple[Run, Path]) -> None:
    run, now = moved
    loaded = load_backbone(str(now), dtype="float32")
    by_place, by_model = (predict(run, [{"text": "a a b"}], backbone=given) for given in (str(now), loaded))
    assert by_place == by_model
    assert evaluate(run, backbone=str(now)) == evaluate(run, backbone=loaded)
    [found] = measure(run.folder, functional=Truncation(backbone=str(now), rows=8, ranks=(1,)))
    assert found.functional is not None


def test_an_export_names_the_new_place(moved: tuple[Run, Path], tmp_path: Path) -> None:
    run, now = moved
    assert main(["export", str(run.folder), "--output", str(tmp_path / "out"), "--backbone", str(now)]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(now)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_what_is_not_ours_is_not_trained_again(
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


def test_a_runs_own_file_cut_in_half_says_what_to_do(moved: tuple[Run, Path], tmp_path: Path) -> None:
    run, now = moved
    shutil.copytree(run.folder, tmp_path / "run")
    cut(tmp_path / "run" / runs.TENSORS)
    with pytest.raises(ValueError, match=r"softprompt\.safetensors is no whole .*copy its folder again"):
        runs.open_run(tmp_path / "run").prompt(load_backbone(str(now), dtype="float32"))
