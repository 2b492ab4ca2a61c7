"""What parity tests of exports share: finished runs of random prompts, without any training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from softprompt import METHODS, Backbone, Experiment, Run, attach, runs
from softprompt.tasks import Task

LENGTHS = {"plain": 5, "dpt": 11, "residual": 2}
TASK = Task(
    name="tickets",
    template="Ticket: {text}\nQueue:",
    label="queue",
    label_words={"billing": "billing", "login": "login", "other": "other"},
)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    """A finished run of a random prompt, as long as three embeddings and of a length of its own for each method."""

    def make(backbone: Backbone, method: str, name: str = "") -> Run:
        config = METHODS[method](length=LENGTHS.get(method, 12))
        experiment = Experiment(backbone=backbone.source, prompt=config)
        run = runs.create(experiment, TASK, backbone, tmp_path / "runs", name or method, "")
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(len(method)))
        with torch.no_grad():
            for weights in prompt.parameters():
                weights += 0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
        return run.finish(attach(backbone, prompt), {"test": 0.5})

    return make
