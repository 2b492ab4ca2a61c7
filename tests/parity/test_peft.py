"""A run's folder is a stock PEFT folder: same logits, same text, and a refusal where PEFT cannot say the prompt."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from softprompt import Experiment, Run, TrainingConfig, attach, export_peft, load_backbone, read_prompt, train
from softprompt.backbones import Backbone
from softprompt.export import peft_refusal
from softprompt.prompts import METHODS, Folded
from softprompt.prompts.dpt import DPT

KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_name_or_path",
}
PAIR = ("adapter_config.json", "adapter_model.safetensors")
PLAIN = [name for name, config in METHODS.items() if config.folds == "prompt"]
CONFIGS = {
    **{name: config(length=12) for name, config in METHODS.items()},
    "dpt around label words": DPT(length=12, anchor="label_words"),
    "dpt without an anchor": DPT(length=12, anchor="none"),
}
"""`dpt` itself is anchored at vocabulary rows."""
OTHERS = [name for name in METHODS if name not in PLAIN]
MakeRun = Callable[[str], Run]


@pytest.fixture(scope="module")
def trained(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A run of that configuration, trained for three steps."""
    made: dict[str, Run] = {}
    backbone = load_backbone(str(llama_folder), dtype="float32")
    out = tmp_path_factory.mktemp("runs")

    def make(method: str) -> Run:
        if method not in made:
            experiment = Experiment(
                backbone=str(llama_folder),
                task=str(ticket_task),
                prompt=CONFIGS[method],
                training=TrainingConfig(steps=3, batch_size=8, eval_steps=3),
                dtype="float32",
            )
            made[method] = train(experiment, out=out, name=method, backbone=backbone)
        return made[method]

    return make


def ids() -> torch.Tensor:
    return torch.randint(3, 300, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", [*PLAIN, "dpt around label words", "dpt without an anchor"])
def test_stock_peft_loads_run_folder(method: str, trained: MakeRun, llama_folder: Path) -> None:
    run = trained(method)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder, dtype="float32"), run.folder)
    backbone = load_backbone(str(llama_folder), dtype="float32")
    ours = attach(backbone, run.prompt(backbone).fold())
    with torch.no_grad():
        expected = theirs(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits[:, 12:]
        # float32 sums in another order
        torch.testing.assert_close(ours(ids()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        made = theirs.generate(
            input_ids=ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=8, do_sample=False, eos_token_id=[-1]
        )
    assert torch.equal(torch.stack(list(ours.generate(ids(), max_new_tokens=8, stop=[])), 1), made[:, -8:])


def test_peft_finds_backbone_named_in_folder(trained: MakeRun, llama_folder: Path) -> None:
    theirs = AutoPeftModelForCausalLM.from_pretrained(trained(PLAIN[0]).folder)
    assert theirs.get_base_model().config.name_or_path == str(llama_folder.resolve())


@pytest.mark.parametrize("method", PLAIN)
def test_adapter_config_has_portable_keys_only(method: str, trained: MakeRun) -> None:
    values = json.loads((trained(method).folder / "adapter_config.json").read_text())
    assert values.keys() == KEYS
    assert values["peft_type"] == "PROMPT_TUNING"
    assert (values["task_type"], values["num_transformer_submodules"]) == ("CAUSAL_LM", 1)
    assert (values["num_virtual_tokens"], values["token_dim"]) == (12, 32)
    assert (values["num_layers"], values["num_attention_heads"]) == (2, 4)


def test_prompt_reads_back_from_peft_files(trained: MakeRun, llama_folder: Path, tmp_path: Path) -> None:
    run, backbone = trained(PLAIN[0]), load_backbone(str(llama_folder), dtype="float32")
    for name in PAIR:
        (tmp_path / name).write_bytes((run.folder / name).read_bytes())
    assert torch.equal(read_prompt(tmp_path, backbone).prompt(), run.prompt(backbone).prompt())
    assert torch.equal(read_prompt(run.folder, backbone).prompt(), run.prompt(backbone).prompt())


@pytest.mark.parametrize("method", OTHERS)
def test_method_without_peft_format_is_not_written(
    method: str, trained: MakeRun, llama_folder: Path, tmp_path: Path
) -> None:
    run, backbone = trained(method), load_backbone(str(llama_folder), dtype="float32")
    assert not [name for name in PAIR if (run.folder / name).exists()]
    folded = run.prompt(backbone).fold()
    reason = peft_refusal(folded, backbone)
    assert reason in (run.folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"also changes the input's own embeddings; use .* or train dpt or residual"):
        export_peft(folded, backbone, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_architecture_without_peft_format_is_refused(tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    own = tiny_backbone("llama")
    backbone = Backbone(own.model, own.tokenizer, "vit", "vit", "vision")
    with pytest.raises(
        ValueError,
        match=r"no prompt-tuning format for vision models, whose prompt follows \[CLS\]; use softprompt",
    ):
        export_peft(Folded(torch.zeros(3, 32)), backbone, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_token_dim_is_embedding_width(tiny_backbone: Callable[[str], Backbone], tmp_path: Path) -> None:
    """OPT projects its embeddings; a folder with its hidden size would not load."""
    backbone = tiny_backbone("opt")
    export_peft(Folded(torch.zeros(3, backbone.dim)), backbone, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["token_dim"] == 16
