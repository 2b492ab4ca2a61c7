"""Runs the journeys once per session, in a process of their own, and hands out what came out of them."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

HERE = Path(__file__).parent
MODELS = ("llama", "t5", "bert", "bert_mlm", "vit")


def devices() -> list[str]:
    """The devices at hand besides the CPU: the pretend one, or a GPU; `SOFTPROMPT_TEST_DEVICE` chooses."""
    chosen = os.environ.get("SOFTPROMPT_TEST_DEVICE")
    return [chosen] if chosen else ["pretend", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(), scope="session")


@pytest.fixture(scope="session")
def journeys(device: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What came out of every stage on the CPU and on `device`, which share a process; once for all xdist workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / f"devices-{device}"
    with FileLock(shared / f"devices-{device}.lock"):
        result = folder / "job.result.json"
        if not result.is_file():
            folder.mkdir(exist_ok=True)
            models = _models(folder, request.getfixturevalue("tiny_backbone"))
            _run(folder, {"models": models, "devices": ["cpu", device]})
        values: dict[str, Any] = json.loads(result.read_text())
    return values


def _run(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "job.json").write_text(json.dumps(settings))
    source = Path(importlib.util.find_spec("softprompt").origin).parents[1]  # type: ignore[union-attr,arg-type]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "SOFTPROMPT_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, HERE / "journeys.py", folder / "job.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process of the journeys ended with {done.returncode}: {done.stderr[-3000:]}")


def _models(folder: Path, tiny_backbone: Any) -> dict[str, list[str]]:
    """Each model's folder, and its task."""
    tasks = _tasks(folder)
    models = {}
    for name in MODELS:
        backbone = tiny_backbone(name)
        backbone.model.save_pretrained(folder / name)
        if name != "vit":
            backbone.tokenizer.save_pretrained(folder / name)
        models[name] = [str(folder / name), tasks[name]]
    return models


def _tasks(folder: Path) -> dict[str, str]:
    """A classification with labels of several tokens, an answer in free text, labels of one token, and images."""
    draw = random.Random(0)
    rows = [(letter, " ".join([letter] * draw.randint(2, 8))) for letter in "abc" * 40]
    words = {"a": "Billing", "b": "Sales", "c": "Returns"}
    (folder / "rows.csv").write_text("text,letter,word\n" + "".join(f"{t},{x},{words[x]}\n" for x, t in rows))
    template = 'train = "rows.csv"\ntemplate = "Ticket: {text}\\nQueue:"\n'
    (folder / "words.toml").write_text(template + 'label = "word"\n')
    (folder / "text.toml").write_text(template + 'target = "word"\nmetrics = ["exact_match"]\n')
    (folder / "letters.toml").write_text(template + 'label = "letter"\n')
    for name, color in (("grass", (30, 180, 40)), ("sea", (20, 60, 200)), ("sunset", (220, 110, 30))):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(20):
            shade = tuple(min(255, max(0, value + draw.randint(-30, 30))) for value in color)
            Image.new("RGB", (32, 32), shade).save(folder / "photos" / name / f"{number:02}.png")
    files = {"llama": "words.toml", "t5": "text.toml", "bert": "letters.toml", "bert_mlm": "letters.toml"}
    return {name: str(folder / file) for name, file in files.items()} | {"vit": str(folder / "photos")}
