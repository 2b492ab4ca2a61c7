"""Three short real runs on SmolLM2-135M, and real servers of vLLM and llama.cpp, each in its own environment."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import servers
import torch
from served import ROWS, Served, Start

from softprompt import (
    DPT,
    Backbone,
    Experiment,
    Plain,
    Run,
    TrainingConfig,
    assets,
    attach,
    load_backbone,
    predict,
    runs,
    train,
)
from softprompt.tasks import Task
from softprompt.tasks.data.tabular import read_rows

ROOT = Path(__file__).parents[2]
TEAMS = {
    "BILLING": "billing team",
    "SHIPPING": "shipping team",
    "TECHNICAL": "technical team",
    "ACCOUNT": "account team",
    "RETURNS": "team of returns",
    "PRAISE": "team of praise",
}
"""Labels of two and three tokens, two of which begin with the same one."""


def _require(engine: str) -> None:
    python = servers.python(engine)
    if not python.is_file():
        pytest.skip(f"{python.parents[1]} is absent; make it with: make engines")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Film reviews (labels of one token), tickets (labels of several tokens), and tickets with written answers."""
    folder = tmp_path_factory.mktemp("engines")
    tickets = list(csv.DictReader((ROOT / "examples/support/tickets.csv").open()))
    with (folder / "tickets.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "queue", "answer"])
        table.writerows([row["text"], row["queue"], f"To the {row['queue'].lower()} desk."] for row in tickets)
    shared = 'train = "tickets.csv"\nmax_input_tokens = 64\n'
    words = "".join(f'{label} = "{word}"\n' for label, word in TEAMS.items())
    label_words = f'template = "Message: {{text}}\\nQueue:"\nlabel = "queue"\n[label_words]\n{words}'
    target = 'template = "Message: {text}\\nAnswer:"\ntarget = "answer"\nmetrics = ["exact_match"]\n'
    (folder / "queues.toml").write_text(shared + label_words)
    (folder / "answers.toml").write_text(shared + target)
    backbone = load_backbone("smollm2-135m", dtype="float32")
    lengths = {"sentiment": 20, str(folder / "queues.toml"): 10, str(folder / "answers.toml"): 10}
    finished = {}
    for name, (task, length) in zip(("film", "queues", "answers"), lengths.items(), strict=True):
        training = TrainingConfig(steps=30, batch_size=8, eval_steps=30, dev_rows=20, test_rows=20, max_new_tokens=16)
        experiment = Experiment(task=task, prompt=Plain(length=length), training=training, dtype="float32")
        finished[name] = train(experiment, out=folder / "runs", name=name, backbone=backbone)
    reviews = read_rows(assets.fetch("rotten-tomatoes"))
    opinions = zip(reviews["text"][:], reviews["category"][:], strict=True)
    films = [text for text, category in opinions if category in ("fresh", "rotten")][:ROWS]
    messages = [row["text"] for row in tickets][:ROWS]
    texts = {"film": films, "queues": messages, "answers": messages}
    live = {name: predict(run, texts[name], backbone=backbone) for name, run in finished.items()}
    return Served(finished, texts, live, backbone)


@pytest.fixture
def vllm(tmp_path: Path) -> Start:
    """`with vllm(MODEL, "--dtype", "float32") as url:`; the model is served as `model`."""
    _require("vllm")
    return lambda model, *flags: servers.vllm(model, *flags, log=tmp_path / "vllm.log")


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Start:
    """`with llama_cpp(FILE, exact=True) as url:`."""
    _require("llamacpp")
    return lambda model, exact=True: servers.llama_cpp(model, exact=exact, log=tmp_path / "llama.log")


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[[Backbone], Run]:
    """A finished run of a random prompt of eleven vectors, without training."""

    def make(backbone: Backbone) -> Run:
        words = {"billing": "billing", "login": "login", "other": "other"}
        task = Task(name="tickets", template="Ticket: {text}\nQueue:", label="queue", label_words=words)
        config = DPT(length=11, rank=3)
        created = runs.create(
            Experiment(backbone=backbone.source, prompt=config),
            task,
            backbone,
            tmp_path,
            "tiny",
            dict.fromkeys(("splits", "full", "test"), ""),
        )
        prompt = config.build(backbone.host(), torch.Generator().manual_seed(0))
        return created.finish(attach(backbone, prompt), {"test": 0.5})

    return make
