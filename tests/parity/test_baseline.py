"""LoRA as we write it is LoRA as stock PEFT loads it; and a run's README names the class that it is loaded on."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import Backbone, Experiment, attach, runs
from softprompt.models import fresh_head, model_class
from softprompt.models.baselines import export_lora, tune
from softprompt.runs import model_card
from softprompt.tasks import Task
from softprompt.types import Baseline

peft = pytest.importorskip("peft")
MakeBackbone = Callable[[str], Backbone]
TASK = Task(name="tickets", template="{text}", label="queue", label_words={"a": "a", "b": "b"})


def outputs(backbone: Backbone, model: Any) -> torch.Tensor:
    if backbone.architecture == "vision":
        inputs: dict[str, torch.Tensor] = {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        }
    else:
        inputs = {"input_ids": torch.tensor([[5, 9, 40, 7], [8, 6, 200, 11]])}
    if backbone.architecture == "encoder_decoder":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    actual: torch.Tensor = model(**inputs)[0]
    return actual


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "bert_mlm", "vit", "dinov2"])
def test_peft_loads_every_lora_weight(kind: str, tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    own = tiny_backbone(kind)
    copied, tuned = tune(own, "lora", 0)
    assert tuned is not None
    for parameter in tuned.parameters():  # B begins as zeros, which change nothing
        parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    expected, bare = outputs(copied, copied.model), outputs(own, own.model)
    assert not torch.allclose(expected, bare, atol=1e-2)
    export_lora(copied, model_class(copied).peft_task_type, tmp_path)
    with warnings.catch_warnings():  # PEFT passes over weights whose names it does not know, with a warning
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(own.model), tmp_path)
    torch.testing.assert_close(outputs(own, theirs.base_model.model), expected, rtol=0, atol=0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("kind", "baseline", "words"),
    [
        ("llama", "lora", "import AutoModelForCausalLM\n"),
        ("bert_mlm", "lora", "import AutoModelForMaskedLM\n"),
        ("bert", "lora", "import AutoModel\n"),
        ("bert", "lora", "The trained head is in `head.safetensors`."),
        ("bert", "lora", "the trained tensors are in `head.safetensors` and `tuned.safetensors`."),
        ("bert", "none", "the trained tensors are in `softprompt.safetensors` and `head.safetensors`."),
        ("llama", "full", "the trained tensors are in `tuned.safetensors`."),
    ],
)
def test_readme_names_files_of_trained_weights(
    kind: str, baseline: Baseline, words: str, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    own = tiny_backbone(kind)
    experiment = Experiment(backbone=own.source, baseline=baseline)
    run = runs.create(experiment, TASK, own, tmp_path, "it", dict.fromkeys(("splits", "full", "test"), ""))
    copied, tuned = tune(own, baseline, 0)
    prompt = experiment.prompt.build(own.host(), torch.Generator()) if baseline == "none" else None
    trained = attach(copied, prompt, head=fresh_head(own, 2, torch.Generator()), tuned=tuned)
    results = {"metric": "accuracy", "best_step": 1, "n_test": 2, "n_dev": 2, "trainable": 3}
    model_card.write(
        run, trained, {**results, **dict.fromkeys(("test", "dev", "ci_low", "ci_high", "majority"), 0.5)}, ""
    )
    assert words in (run.folder / "README.md").read_text()


def test_readme_loads_gguf_as_transformers_does(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    own = dataclasses.replace(tiny_backbone("llama"), base="/models/small.gguf")
    experiment = Experiment(backbone=own.source)
    run = runs.create(experiment, TASK, own, tmp_path, "it", dict.fromkeys(("splits", "full", "test"), ""))
    trained = attach(own, experiment.prompt.build(own.host(), torch.Generator()))
    results = {"metric": "accuracy", "best_step": 1, "n_test": 2, "n_dev": 2, "trainable": 3}
    model_card.write(
        run, trained, {**results, **dict.fromkeys(("test", "dev", "ci_low", "ci_high", "majority"), 0.5)}, ""
    )
    assert 'from_pretrained("/models", gguf_file="small.gguf"), "it")' in (run.folder / "README.md").read_text()
