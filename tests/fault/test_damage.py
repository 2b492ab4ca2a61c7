"""Truncated, swapped and hostile files, full disks and races: a one-line error, and nothing half-written."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt import (
    DPT,
    Experiment,
    Interrupted,
    Progress,
    Run,
    TrainingConfig,
    files,
    list_runs,
    resume,
    runs,
    train,
)
from softprompt.cli import main
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import NullCallback

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=4, batch_size=8, eval_steps=2),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(experiment, out=tmp_path_factory.mktemp("whole"), name="run")


@pytest.fixture(scope="module")
def stopped(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after its second step."""

    def stop(_: object, progress: Progress) -> None:
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NullCallback, "on_step", stop)
        with pytest.raises(Interrupted):
            train(experiment, out=out, name="run")
    return out / "run"


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one-line error of a failed command."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("softprompt: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    assert "--debug" not in lines[0], f"this error has no message of its own: {lines[0]}"
    return lines[0]


def edited(change: Callable[[Any], Any]) -> Damage:
    """Apply `change` to the values of a JSON file."""

    def damage(file: Path) -> None:
        values = json.loads(file.read_text())
        file.write_text(json.dumps(change(values) or values))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda file: save_file(change(load_file(file)), file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def hostile_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + b"{" * 64)


def hostile_offsets(file: Path) -> None:
    header = json.dumps({"left": {"dtype": "F32", "shape": [2**40, 2], "data_offsets": [0, 2**43]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["BOMB"],))


BROKEN: dict[str, Damage] = {
    "truncated": truncated,
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "pickle": lambda file: file.write_bytes(pickle.dumps(Bomb())),
    "header": hostile_header,
    "offsets": hostile_offsets,
}
SWAPPED: dict[str, Damage] = {
    "other rank": tensors(lambda tensors_: {name: torch.zeros(3, 3) for name in tensors_}),
    "other names": tensors(lambda tensors_: {f"x{name}": tensor for name, tensor in tensors_.items()}),
    "one less": tensors(lambda tensors_: dict(list(tensors_.items())[1:])),
    "nan": tensors(lambda tensors_: {name: tensor * torch.nan for name, tensor in tensors_.items()}),
}
RECORDS: dict[str, Damage] = {
    "truncated": truncated,
    "a list": lambda file: file.write_text("[]"),
    "deep": lambda file: file.write_text("[" * 200_000),
    "binary": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "later": edited(lambda values: values.update(format=2)),
    "results a list": edited(lambda values: values.update(results=[1])),
    "no experiment": edited(lambda values: values.pop("experiment") and None),
    "no task": edited(lambda values: values.pop("task") and None),
    "no backbone": edited(lambda values: values.pop("backbone") and None),
    "experiment is a list": edited(lambda values: values.update(experiment=[])),
    "unknown method": edited(lambda values: values["experiment"]["prompt"].update(method="lora")),
    "unknown setting": edited(lambda values: values["experiment"].update(color="red")),
    "unknown training": edited(lambda values: values["experiment"]["training"].update(color="red")),
    "rank is a text": edited(lambda values: values["experiment"]["prompt"].update(rank="ten")),
    "steps is a text": edited(lambda values: values["experiment"]["training"].update(steps="ten")),
    "no words": edited(lambda values: values["task"].update(label_words={})),
    "unknown task key": edited(lambda values: values["task"].update(color="red")),
    "template is a number": edited(lambda values: values["task"].update(template=7)),
}


@pytest.mark.parametrize("damage", [*BROKEN.values(), *SWAPPED.values()], ids=[*BROKEN, *SWAPPED])
def test_damaged_prompt_is_reported(
    damage: Damage, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    damage(folder / "softprompt.safetensors")
    lines = sentence(capsys, "evaluate", str(folder))
    assert str(folder / "softprompt.safetensors") in lines
    assert "damaged" in lines
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("command", ["evaluate", "resume"])
def test_damaged_record_is_reported(
    command: str, damage: Damage, finished: Run, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder if command == "evaluate" else stopped, folder)
    damage(folder / "softprompt.json")
    arguments = ["evaluate", str(folder)] if command == "evaluate" else ["train", "--resume", str(folder)]
    assert str(folder / "softprompt.json") in sentence(capsys, *arguments)


def test_resume_with_a_moved_backbone(
    finished: Run, stopped: Path, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, gone, other = tmp_path / "run", tmp_path / "gone", tmp_path / "other"
    shutil.copytree(stopped, folder)
    shutil.copytree(llama_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    edited(lambda values: values["experiment"].update(backbone=str(gone)))(folder / "softprompt.json")
    resumed = ["train", "--resume", str(folder)]
    assert "give its current path with --backbone" in sentence(capsys, *resumed)
    assert f"the weights of {other} are not those" in sentence(capsys, *resumed, "--backbone", str(other))
    assert main([*resumed, "--backbone", str(llama_folder)]) == 0
    assert runs.open_run(folder).results["test"] == finished.results["test"]


CHECKPOINT = {
    **{f"{part} {name}": (f"{part}.safetensors", damage) for part in ("prompt", "best") for name, damage in
       (SWAPPED | {"truncated": truncated, "missing": Path.unlink}).items()},
    **{f"{part} {name}": (f"{part}.safetensors", BROKEN[name]) for part in ("optimizer", "random")
       for name in ("truncated", "missing")},
    "optimizer other rank": ("optimizer.safetensors", SWAPPED["other rank"]),
    "optimizer other names": ("optimizer.safetensors", SWAPPED["other names"]),
    "random other size": ("random.safetensors", tensors(lambda tensors_: {"cpu": tensors_["cpu"][:7]})),
    "random other names": ("random.safetensors", SWAPPED["other names"]),
    "state truncated": ("trainer_state.json", truncated),
    "state missing": ("trainer_state.json", Path.unlink),
    "state without its step": ("trainer_state.json", edited(lambda values: values.pop("step") and None)),
    "state without its best": ("trainer_state.json", edited(lambda values: values.pop("best_step") and None)),
    "state of another step": ("trainer_state.json", edited(lambda values: values.update(step=3))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), CHECKPOINT.values(), ids=CHECKPOINT)
def test_damaged_checkpoint_is_reported(
    name: str, damage: Damage, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    damage(folder / "checkpoints/step-000002" / name)
    lines = sentence(capsys, "train", "--resume", str(folder))
    assert "step-000002" in lines
    assert "damaged" in lines


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let the kernel refuse to write files beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("as it was")
    with no_file_beyond(100):
        with pytest.raises(OSError, match=r"kept cannot be written \(File too large\); make room on its disk"):
            files.write_text(tmp_path / "kept", "x" * 200)
        with pytest.raises(OSError, match=r"new\.safetensors cannot be written \(.*File too large.*\); make room"):
            files.write_tensors(tmp_path / "new.safetensors", {"x": torch.zeros(100)})
    assert listing(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_text() == "as it was"


@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 12, 14, 16])
def test_full_disk_is_reported_and_resumable(
    at: int, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The `at`-th write of the run fails; once there is room again, the run resumes to the same result."""
    calls: list[Path] = []
    sync = files._sync

    def fail_when_full(path: Path) -> None:
        calls.append(path)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(files, "_sync", fail_when_full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\); make room on its disk"):
        train(finished.experiment, out=tmp_path, name="run")
    monkeypatch.undo()
    assert not [name for name in listing(tmp_path) if "/." in f"/{name}"], "a draft was left behind"
    if not (tmp_path / "run").exists():
        assert at <= 5, "a failure before the first step leaves nothing"
        return
    resumed_run = resume(tmp_path / "run")
    for name in ("metrics.jsonl", "softprompt.safetensors"):
        assert (resumed_run.folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_one_of_many_runs_gets_a_name(finished: Run, tmp_path: Path, tiny_backbone: Callable[[str], Any]) -> None:
    backbone, task = tiny_backbone("llama"), load_task(finished.experiment.task)

    def claim(_: int) -> str:
        try:
            return runs.create(
                finished.experiment, task, backbone, tmp_path, "mine", dict.fromkeys(("splits", "full", "test"), "")
            ).name
        except FileExistsError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(claim, range(16)))
        numbered = list(
            pool.map(
                lambda _: (
                    runs.create(
                        finished.experiment,
                        task,
                        backbone,
                        tmp_path,
                        None,
                        dict.fromkeys(("splits", "full", "test"), ""),
                    ).name
                ),
                range(16),
            )
        )
    assert names.count("mine") == 1
    assert all("exists and is never overwritten; choose another --name" in one for one in names if one != "mine")
    assert len(set(numbered)) == 16
    assert {run.name for run in list_runs(tmp_path)} == {"mine", *numbered}
    assert not [name for name in listing(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "/absolute"])
def test_invalid_run_name_is_refused(name: str, finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a plain folder name: "):
        train(finished.experiment, out=tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


def test_run_is_never_overwritten(finished: Run) -> None:
    before = listing(finished.folder)
    with pytest.raises(FileExistsError, match=r"run .* exists and is never overwritten"):
        train(finished.experiment, out=finished.folder.parent, name=finished.name)
    assert listing(finished.folder) == before
