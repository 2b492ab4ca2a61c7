"""`softprompt export` as a user types it: several runs, every format, words, and refusals in one sentence."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import DPT, DePT, Experiment, Plain, PromptConfig, attach, load_backbone, load_task, runs
from softprompt.cli import main
from softprompt.export import FORMATS


def call(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue().splitlines(), err.getvalue().splitlines()


def result(*arguments: str | Path) -> Any:
    code, out, err = call(*arguments)
    assert code == 0, "\n".join(err)
    assert len(out) == 1
    return json.loads(out[0])


@pytest.fixture(scope="module")
def folders(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of a plain, a decomposed and a shifting prompt."""
    out, backbone, task = tmp_path_factory.mktemp("runs"), load_backbone(str(llama_folder), dtype="float32"), {}
    wanted: dict[str, PromptConfig] = {"one": Plain(length=3), "two": DPT(length=5, rank=2), "three": DePT(length=4)}
    task = load_task(str(ticket_task))
    made = {}
    for name, config in wanted.items():
        experiment = Experiment(backbone=str(llama_folder), task=str(ticket_task), prompt=config, dtype="float32")
        run = runs.create(experiment, task, backbone, out, name, dict.fromkeys(("splits", "full", "test"), ""))
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(0))
        made[name] = run.finish(attach(backbone, prompt), {"test": 0.5}).folder
    return made


def test_several_runs_in_one_checkpoint(folders: dict[str, Path], tmp_path: Path) -> None:
    token_names = ["--token-names", "one=<first>", "two=<second>"]
    said = result("export", folders["one"], folders["two"], "--to", "vocab", "--output", tmp_path / "out", *token_names)
    assert said["runs"] == [str(folders["one"]), str(folders["two"])]
    assert (said["to"], said["output"]) == ("vocab", str(tmp_path / "out"))
    assert (said["prompts"], said["as_text"]) == ({"one": 3, "two": 5}, True)
    assert said["largest_difference"] < 1e-4
    usage = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert usage["prompts"]["two"]["text"].startswith("<second-0><second-1>")
    assert usage["unsuppressed_probability"] == said["unsuppressed_probability"]


@pytest.mark.parametrize("to", [name for name, form in FORMATS.items() if name != "dept"])
def test_every_format(to: str, folders: dict[str, Path], tmp_path: Path) -> None:
    said = result("export", folders["one"], "--to", to, "--output", tmp_path / "out")
    assert said["prompts"] == {"one": 3}
    assert list((tmp_path / "out").iterdir())
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_beside_the_run_by_default(folders: dict[str, Path]) -> None:
    said = result("export", folders["three"], "--to", "npz")
    assert said["output"] == str(folders["three"].with_name("three-npz"))
    code, out, err = call("export", folders["three"], "--to", "npz")
    assert (code, out) == (1, [])
    assert "never overwritten; choose another --output" in err[-1]


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (["three"], ["--to", "vocab"], "dept also changes the input's own embeddings; export to npz"),
        (["one", "two"], ["--to", "peft"], "peft holds one prompt, but 2 runs are given"),
        (["one"], ["--to", "vocab", "--token-names", "first"], "token_names holds 'first'; give NAME=<name>"),
        (
            ["one"],
            ["--to", "vocab", "--token-names", "x=<y>"],
            "token_names names 'x', which is not one of the runs one",
        ),
        (
            ["one"],
            ["--to", "vocab", "--token-names", "one=<x>", "one=<y>"],
            "token_names names a run twice (one=<x>, one=<y>)",
        ),
        (["one"], ["--to", "peft", "--token-names", "one=<y>"], "peft has no token names for its prompts"),
        (["one"], ["--to", "dept"], "the run trained plain"),
        ([], ["--to", "vocab"], "no run is given"),
    ],
)
def test_refusals(names: list[str], flags: list[str], message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    code, out, err = call("export", *(folders[name] for name in names), *flags, "--output", tmp_path / "out")
    assert (code, out) == (1, [])
    assert err[-1].startswith("softprompt: ")
    assert message in err[-1]
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_wrong_usage(folders: dict[str, Path]) -> None:
    assert call("export", folders["one"], "--to", "onnx")[0] == 2
