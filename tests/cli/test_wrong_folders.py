"""Every command that takes the folder of a run says what is wrong with it: missing, a file, or without a run."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from called import call

RUN = "softprompt.json"
PROMPT = f"neither a run ({RUN}) nor a PEFT prompt (adapter_model.safetensors)"


def sweep_of(folder: Path) -> list[object]:
    """A sweep whose experiments start from the prompt in `folder`."""
    file = folder.parent / "sweep.toml"
    file.write_text(f'task = "sentiment"\ninit_prompt = "{folder}"\n[[method]]\nname = "plain"\n')
    return ["sweep", file, "--dry-run"]


COMMANDS: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "evaluate": (lambda folder: ["evaluate", folder], PROMPT),
    "predict": (lambda folder: ["predict", folder, "--input", "rows.csv"], PROMPT),
    "export": (lambda folder: ["export", folder], PROMPT),
    "push": (lambda folder: ["push", folder, "me/it"], f"it has no {RUN}"),
    "rank": (lambda folder: ["rank", folder], f"neither a run ({RUN}), a PEFT folder"),
    "report": (lambda folder: ["report", folder, "--out", folder.parent / "report"], "there is no finished run"),
    "serve": (lambda folder: ["serve", folder], PROMPT),
    "serve_named": (lambda folder: ["serve", f"reviews={folder}", "--backbone", "smollm2-135m"], PROMPT),
    "lm-eval": (lambda folder: ["lm-eval", folder, "--tasks", "arc_easy"], PROMPT),
    "resume": (lambda folder: ["train", "--resume", folder], f"it has no {RUN}"),
    "init_prompt": (lambda folder: ["train", "--out", folder.parent / "runs", "--init-prompt", folder], PROMPT),
    "sweep": (sweep_of, PROMPT),
}
"""The command's arguments, and what an empty folder lacks."""
MODULES = {"serve": "uvicorn", "serve_named": "uvicorn", "report": "matplotlib", "lm-eval": "lm_eval"}
"""What the commands of extras need."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_wrong_folder_is_refused_with_what_is_wrong(command: str, kind: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(MODULES.get(command, "torch")) is None:
        pytest.skip(f"{MODULES[command]} is not installed")
    arguments, lacks = COMMANDS[command]
    folder = tmp_path / "given"
    if kind == "file":
        folder.write_text("no folder")
    elif kind == "empty":
        folder.mkdir()
    sentence = call(*arguments(folder)).sentence
    expected = {"missing": f"there is no folder {folder};", "file": f"{folder} is a file and not a folder;"}
    assert expected.get(kind, lacks) in sentence
    assert str(folder) in sentence
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "report").exists()
