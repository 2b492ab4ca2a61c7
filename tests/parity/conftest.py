"""What parity tests share: finished runs of random prompts, without any training, and label words of one token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import WHOLE_WORDS

from softprompt import METHODS, Backbone, Experiment, Run, attach, runs
from softprompt.tasks import Task

LENGTHS = {"plain": 5, "dpt": 11, "residual": 2}
TASK = Task(
    name="tickets",
    template="Ticket: {text}\nQueue:",
    label="queue",
    label_words={"billing": "billing", "login": "login", "other": "other"},
)


@pytest.fixture(scope="session")
def one_token_task(ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows with label words of a token each, which one mask holds."""
    file = tmp_path_factory.mktemp("label_words") / "tickets.toml"
    label_words = "".join(f'{label} = "{word}"\n' for label, word in WHOLE_WORDS.items())
    rows = ticket_task.parent / "train.csv"
    file.write_text(
        f'train = "{rows}"\ntemplate = "Ticket: {{text}}\\nQueue:"\nlabel = "queue"\n[label_words]\n{label_words}'
    )
    return file


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Run]:
    """A finished run of a random prompt, as long as three embeddings and of a length of its own for each method."""

    def make(backbone: Backbone, method: str, name: str = "") -> Run:
        config = METHODS[method](length=LENGTHS.get(method, 12))
        experiment = Experiment(backbone=backbone.source, prompt=config)
        run = runs.create(
            experiment,
            TASK,
            backbone,
            tmp_path / "runs",
            name or method,
            dict.fromkeys(("splits", "full", "test"), ""),
        )
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(len(method)))
        with torch.no_grad():
            for weights in prompt.parameters():
                weights += 0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
        return run.finish(attach(backbone, prompt), {"test": 0.5})

    return make
