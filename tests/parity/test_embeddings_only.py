"""A backbone of which only the embedding table is loaded: the same table, tokenizer, checks and prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import DPT, Experiment, Plain, TrainingConfig, train
from softprompt.backbones import Backbone, load, load_embeddings
from softprompt.models import attach
from softprompt.models.peft_folder import read_peft_folder
from softprompt.serve.prompts.entry import from_folder

MakeBackbone = Callable[[str], Backbone]


@pytest.fixture
def saved(tiny_backbone: MakeBackbone, tmp_path: Path) -> Callable[..., Path]:
    """`saved("gpt2")`: the folder of a tiny model."""

    def save(name: str, **options: Any) -> Path:
        backbone = tiny_backbone(name)
        backbone.model.save_pretrained(tmp_path / name, **options)
        backbone.tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["file", "shards"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_table_and_hash_equal_the_full_models(name: str, options: dict[str, Any], saved: Callable[..., Path]) -> None:
    folder = str(saved(name, **options))
    full, part = load(folder, dtype="float32"), load_embeddings(folder)
    assert part.embeddings_only
    assert part.hash == full.hash
    ids = torch.arange(9)
    torch.testing.assert_close(part.model.get_input_embeddings()(ids), full.model.get_input_embeddings()(ids))
    in_memory = {id(weights) for weights in part.model.parameters() if not weights.is_meta}
    assert len(in_memory) == 1
    same = ("dim", "dtype", "precision", "device", "vocab_size", "max_positions", "base", "architecture")
    assert [getattr(part, key) for key in same] == [getattr(full, key) for key in same]
    assert attach(part).end_of_sequence() == attach(full).end_of_sequence()
    halves = [of(folder, dtype="bfloat16") for of in (load, load_embeddings)]
    assert halves[0].hash == halves[1].hash != full.hash


@pytest.mark.parametrize("prompt", [DPT(length=3, rank=2), Plain(length=4)])
def test_prompt_of_a_run_is_the_same(prompt: Any, llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    training = TrainingConfig(steps=1, batch_size=4, eval_steps=1)
    experiment = Experiment(
        backbone=str(llama_folder), task=str(ticket_task), prompt=prompt, training=training, dtype="float32"
    )
    run = train(experiment, out=tmp_path)
    full, part = load(str(llama_folder), dtype="float32"), load_embeddings(str(llama_folder), dtype="float32")
    entries = [from_folder("tickets", run.folder, backbone) for backbone in (full, part)]
    assert torch.equal(entries[0].prompt.prompt(), entries[1].prompt.prompt())
    for key in ("candidates", "max_input_tokens", "max_new_tokens", "length"):
        assert getattr(entries[0], key) == getattr(entries[1], key)
    other = load(str(llama_folder), dtype="float32")
    with torch.no_grad():
        next(iter(other.model.model.layers.parameters())).add_(1e-3)  # the table stays as it is
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are not those that run"):
        from_folder("tickets", run.folder, load_embeddings(str(tmp_path / "other"), dtype="float32"))


def test_deep_prompts_are_refused(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    training = TrainingConfig(steps=1, batch_size=4, eval_steps=1)
    experiment = Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=Plain(length=3),
        depth="deep",
        training=training,
        dtype="float32",
    )
    run = train(experiment, out=tmp_path)
    part = load_embeddings(str(llama_folder), dtype="float32")
    with pytest.raises(ValueError, match="a deep prompt has keys and values in every layer"):
        from_folder("tickets", run.folder, part)
    with pytest.raises(ValueError, match="a deep prompt has keys and values in every layer"):
        read_peft_folder(run.folder).prompt(part)


def test_hash_of_renamed_tensors_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight, since transformers renames"):
        _ = load_embeddings(str(saved("gpt_neox"))).hash


def test_model_that_is_no_decoder_is_refused(saved: Callable[..., Path]) -> None:
    for name in ("t5", "bert"):
        with pytest.raises(ValueError, match="is not a decoder of text"):
            load_embeddings(str(saved(name)))


def test_checkpoint_without_the_table_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.safetensors from which its embedding table"):
        load_embeddings(str(folder))
    (folder / "model.safetensors").write_bytes((folder / "weights.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"has no model\.safetensors from which its embedding table"):
        load_embeddings(str(folder))
