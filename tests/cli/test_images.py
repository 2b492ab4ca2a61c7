"""`softprompt sweep`, `report` and `rank` on runs that see images, shallow and deep."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softprompt import Backbone
from softprompt.cli import main


def call(*arguments: object, exits: int = 0) -> Any:
    """The JSON of the last line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    assert code == exits, err.getvalue()
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def swept(tiny_backbone: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's file and the runs below it: two depths, two seeds."""
    folder = tmp_path_factory.mktemp("images")
    tiny_backbone("dinov2").model.save_pretrained(folder / "tiny-dinov2")
    for name, color in (("grass", (30, 180, 40)), ("sea", (20, 60, 200))):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            shade = tuple(value + 2 * number for value in color)
            Image.new("RGB", (24, 24), shade).save(folder / "photos" / name / f"{number:02}.png")
    (folder / "sweep.toml").write_text(
        """
        backbone = "tiny-dinov2"
        task = "photos"
        dtype = "float32"
        depth = ["shallow", "deep"]
        seed = [0, 1]
        training = { steps = 4, batch_size = 8, eval_steps = 2, image_size = 16 }
        [[method]]
        name = "plain"
        length = 3
        """
    )
    assert len(call("sweep", folder / "sweep.toml", "--out", folder / "runs")["done"]) == 4
    return folder


def test_sweep_is_skipped_until_an_image_changes(swept: Path) -> None:
    again = call("sweep", swept / "sweep.toml", "--out", swept / "runs")
    assert (again["done"], len(again["skipped"])) == ([], 4)
    image = swept / "photos" / "sea" / "00.png"
    before = image.read_bytes()
    Image.new("RGB", (24, 24), (0, 0, 0)).save(image)
    failed = call("sweep", swept / "sweep.toml", "--out", swept / "runs", exits=1)["failed"]
    image.write_bytes(before)
    assert len(failed) == 4
    assert all("changed after it was started" in one["problem"] for one in failed)


def test_report_has_a_row_per_depth(swept: Path) -> None:
    found = call("report", swept / "runs", "--out", swept / "report")
    assert {cell["row"]: cell["seeds"] for cell in found["cells"]} == {
        "plain depth=shallow": [0, 1],
        "plain depth=deep": [0, 1],
    }
    assert found["skipped"] == []


def test_rank_measures_each_layer(swept: Path) -> None:
    found = call("rank", swept / "runs", "--functional", "--suggest", "--rows", "0")
    for prompt in found["prompts"]:
        views = {name for name in prompt["ranks"] if name.startswith("update")}
        assert len(views) == prompt["num_matrices"]
        last = prompt["functional"]["truncations"][-1]
        assert (last["rank"], last["drop"]["value"]) == (3, 0.0)
    assert {prompt["num_matrices"] for prompt in found["prompts"]} == {1, 3}
    assert {(one["length"], one["num_matrices"]) for one in found["suggestions"]} == {(3, 1), (3, 3)}
    assert {prompt["length"] for prompt in found["prompts"]} == {3}
