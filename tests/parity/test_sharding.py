"""A backbone whose layers are shared out among processes gives what the whole one gives."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import copy_of

from softprompt import DPT, Experiment, TrainingConfig, train
from softprompt.backbones import Backbone, fsdp
from softprompt.training import setup
from softprompt.training.callbacks import NullCallback
from softprompt.training.distributed import DistributedGroup

Said = dict[str, Any]
KINDS = [("llama", "full"), ("qwen3", "full"), ("gemma2", "full"), ("bloom", "full"), ("t5", "full")]
KINDS += [("bart", "full"), ("bert", "full"), ("bert", "self"), ("roberta_mlm", "full"), ("dinov2", "full")]


def precision(kind: str) -> torch.dtype:
    """float64, in which transformers' own attention of Gemma 2 and BLOOM gives NaN beside padding."""
    return torch.float32 if kind in ("gemma2", "bloom") else torch.float64


@pytest.fixture(scope="module")
def processes(
    tiny_backbone: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, tuple[Said, ...]]]:
    """What each of two processes says of each backbone: whole, sharded, and sharded with layers computed again."""
    file = tmp_path_factory.mktemp("shards") / "backbones.pt"
    torch.save(
        {
            f"{kind}-{prompt_attention}": (copy_of(tiny_backbone(kind), precision(kind)), prompt_attention)
            for kind, prompt_attention in KINDS
        },
        file,
    )
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("shards.py"), file],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [torch.load(file.with_name(f"{index}.pt")) for index in range(2)]


@pytest.mark.parametrize(("kind", "prompt_attention"), KINDS)
def test_sharded_loss_gradients_and_answers_match_full(
    kind: str, prompt_attention: str, processes: list[dict[str, tuple[Said, ...]]]
) -> None:
    for said in processes:
        full, *sharded = said[f"{kind}-{prompt_attention}"]
        for parts in sharded:
            assert parts["checksum"] == full["checksum"]
            for name in full.keys() & {"loss", "gradients", "scores", "ever"}:
                # Norms are float32, and the Llama runs through our own layers while it is whole.
                torch.testing.assert_close(parts[name], full[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "prompt_attention"), KINDS)
def test_each_process_holds_its_shard(
    kind: str, prompt_attention: str, processes: list[dict[str, tuple[Said, ...]]]
) -> None:
    name = f"{kind}-{prompt_attention}"
    all_of, parts = processes[0][name][0]["held"], [said[name][1]["held"] for said in processes]
    tables = 2 * 32 * 4 if kind == "t5" else 0  # the relative bias, whole in each
    assert sum(parts) == all_of + tables
    assert max(parts) < 0.51 * all_of + tables
    for said in processes:
        assert said[name][1]["rest"] == said[name][0]["rest"], "what is in no layer is not copied"


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bloom", "t5", "bart"])
def test_generation_continues_until_all_ranks_finish(kind: str, processes: list[dict[str, tuple[Said, ...]]]) -> None:
    for index, said in enumerate(processes):
        full, sharded, _ = said[f"{kind}-full"]
        assert len(full["tokens"]) == (6 if index else 1)
        assert len(sharded["tokens"]) == 6
        torch.testing.assert_close(sharded["tokens"][: len(full["tokens"])], full["tokens"])


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("llama", {"baseline": "lora"}, "the baseline lora trains weights beside or in the layers"),
        ("mpnet", {}, "has no layers that can be identified"),
        ("t5", {"prompt_attention": "self"}, "prompts with prompt_attention=self bypass the layers of t5 .*"),
    ],
)
def test_unshardable_settings_are_refused(
    kind: str, changes: Any, why: str, tiny_backbone: Callable[[str], Backbone], ticket_task: Path, tmp_path: Path
) -> None:
    experiment = Experiment(backbone=kind, task=str(ticket_task), training=TrainingConfig(shard=True), **changes)
    with pytest.raises(ValueError, match=f"^shard is on, but .*{why}; leave it off$"):
        train(experiment, out=tmp_path, backbone=tiny_backbone(kind))
    assert not list(tmp_path.iterdir())


def test_4bit_backbone_is_refused(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    experiment = Experiment(
        backbone=str(llama_folder), task=str(ticket_task), training=TrainingConfig(shard=True), dtype="nf4"
    )
    with pytest.raises(ValueError, match=r"^shard is on, but the weights are quantized \(nf4\); leave it off$"):
        train(experiment, out=tmp_path)


def test_backbone_of_earlier_training_is_refused(
    tiny_backbone: Callable[[str], Backbone], ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("llama")
    monkeypatch.setattr(fsdp, "_sharded", {backbone.model})
    with pytest.raises(
        ValueError, match=r"^llama was sharded over the processes by an earlier training .*load it again"
    ):
        train(Experiment(backbone="llama", task=str(ticket_task)), out=tmp_path, backbone=backbone)


def test_single_process_notes_that_it_holds_all_weights(
    tiny_backbone: Callable[[str], Backbone], ticket_task: Path, tmp_path: Path
) -> None:
    class Told(NullCallback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    training = TrainingConfig(steps=2, batch_size=4, eval_steps=2, shard=True)
    experiment = Experiment(backbone="llama", task=str(ticket_task), prompt=DPT(length=4, rank=2), training=training)
    assert train(experiment, out=tmp_path, backbone=tiny_backbone("llama"), callback=Told()).results is not None
    assert any(note.startswith("one process holds the whole backbone (--shard)") for note in notes)


def test_sharded_backbone_is_loaded_on_cpu_first(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it can be seen without one: `meta` is the other device."""
    actual: dict[str, Any] = {}

    def load(source: str, **inputs: Any) -> Backbone:
        actual.update(inputs)
        raise RuntimeError("seen")

    monkeypatch.setattr(setup, "load", load)
    experiment = Experiment(backbone=str(llama_folder), task=str(ticket_task), training=TrainingConfig(shard=True))
    with pytest.raises(RuntimeError, match="seen"):
        train(experiment, out=tmp_path)
    assert actual["device"] == "cpu"
    assert actual["dtype"] in ("float32", "bfloat16"), "what auto comes to on the device that computes"
    processes = DistributedGroup(cpu=True)
    processes.device = torch.device("meta")
    model = torch.nn.Linear(2, 2)
    processes.shard(model)
    assert model.weight.device.type == "meta"


def test_layerdrop_with_sharding_is_refused(
    tiny_backbone: Callable[[str], Backbone], ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("bart")
    monkeypatch.setattr(backbone.model.config, "encoder_layerdrop", 0.1)
    experiment = Experiment(backbone="bart", task=str(ticket_task), training=TrainingConfig(shard=True, dropout=True))
    with pytest.raises(ValueError, match="dropout makes each process leave out other layers of bart; leave it off"):
        train(experiment, out=tmp_path, backbone=backbone)


def test_accelerate_fsdp_environment_is_refused(
    ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="leave --use_fsdp out, and give softprompt train --shard"):
        train(Experiment(task=str(ticket_task)), out=tmp_path)
