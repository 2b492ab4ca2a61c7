"""What `export` says of its comparison with the live run."""

import json
from pathlib import Path

import pytest

from softprompt.cli import main

UNITS = {
    "peft": "prompt value",
    "npz": "prompt value",
    "vllm": "logit",
    "vocab": "nat of log-probability",
    "gguf": "nat of log-probability",
}
UNITS |= {"llamacpp": "prompt value", "trtllm": "prompt value"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, ticket_task: Path) -> Path:
    out = tmp_path_factory.mktemp("runs")
    flags = ["--backbone", str(llama_folder), "--task", str(ticket_task), "--out", str(out), "--name", "r"]
    flags += ["--dtype", "float32", "--steps", "1", "--batch-size", "4", "--eval-steps", "1"]
    assert main(["train", *flags, "plain", "--length", "3"]) == 0
    return out / "r"


@pytest.mark.parametrize("form", UNITS)
def test_every_format_says_difference_unit_and_tolerance(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
):
    assert main(["export", str(run), "--to", form, "--output", str(tmp_path / "out")]) == 0
    written = capsys.readouterr()
    said = json.loads(written.out.splitlines()[-1])
    assert said["unit"] == UNITS[form]
    assert 0 <= said["largest_difference"] <= said["tolerance"]
    assert f"({UNITS[form]}), tolerance" in " ".join(written.err.split())
