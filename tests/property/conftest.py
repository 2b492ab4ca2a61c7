"""Finished runs for the tests of reports, written without training."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import write_glue, write_superglue
from safetensors.torch import save_file

from softprompt import DPT, Experiment, TrainingConfig
from softprompt.tasks import TASKS

DIM = 32


def _write_run(
    root: Path,
    name: str = "",
    *,
    task: str = "rte",
    prompt: Any = None,
    seed: int = 0,
    training: TrainingConfig | None = None,
    test: float = 0.6,
    backbone: dict[str, Any] | None = None,
    created: str = "2026-11-20T10:00:00+00:00",
    dev_at: dict[int, float] | None = None,
    fields: dict[str, Any] | None = None,
    data: dict[str, str] | None = None,
    task_fields: dict[str, Any] | None = None,
    **results: Any,
) -> Path:
    """A finished run's folder below `root`, as the library writes one."""
    prompt = prompt or DPT(length=6, rank=2)
    experiment = Experiment(task=task, prompt=prompt, seed=seed, training=training or TrainingConfig(steps=6))
    experiment = experiment.replace(**fields or {})
    folder = root / "runs" / (name or f"{len(list((root / 'runs').glob('*')))}-run")
    folder.mkdir(parents=True)
    values = {
        "metric": "accuracy", "dev": 0.6, "test": test, "n_dev": 50, "n_test": 100, "majority": 0.5,
        "ci_low": test - 0.05, "ci_high": test + 0.05, "extra_metrics": {}, "protocol": "heldout",
        "trainable": prompt.count(DIM), "steps": 6, "best_step": 4, "seconds": 12.5, **results,
    }  # fmt: skip
    recorded = {
        "base": "org/tiny",
        "dim": DIM,
        "hash": "ab" * 32,
        "dtype": "float32",
        "rounded": {},
        "architecture": "causal",
        "note": "",
    }
    record = {
        "format": 1,
        "hash": experiment.hash,
        "experiment": experiment.to_json(),
        "task": TASKS[task.partition(":")[0]].to_json() | (task_fields or {}),
        "data": {"splits": f"splits {seed}", "full": "rows", "test": "test rows"} | (data or {}),
        "backbone": {**recorded, **(backbone or {})},
        "versions": {"torch": "2.0"},
        "created": created,
        "results": values,
    }
    (folder / "softprompt.json").write_text(json.dumps(record))
    save_file({"left": torch.zeros(25)}, folder / "softprompt.safetensors")
    dev_at = {3: 0.5, 6: 0.6} if dev_at is None else dev_at
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, 7):
            log.write(json.dumps({"step": step, "loss": 1 / step, "lr": 0.1} | _dev(dev_at, step)) + "\n")
    return folder


def _dev(dev_at: dict[int, float], step: int) -> dict[str, float]:
    return {"dev": dev_at[step]} if step in dev_at else {}


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """`write_run(root, test=0.6, seed=1, ...)`: a run below `root`."""
    return _write_run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(test=0.6, seed=1, ...)`: a run in the test's own folder."""
    return functools.partial(_write_run, tmp_path)


@pytest.fixture(scope="module")
def superglue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_superglue(tmp_path_factory.mktemp("superglue"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))
