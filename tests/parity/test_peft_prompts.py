"""Prompts that stock PEFT trained and saved: our logits are PEFT's, for every type that embedding rows express."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt import Backbone, Folded, attach
from softprompt.models.peft_folder import read_peft_folder
from softprompt.runs import read_prompt

MakeBackbone = Callable[[str], Backbone]
DECODER, ENCODER_DECODER = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}
LENGTH = 5


class Case(NamedTuple):
    model: str
    config: Callable[[], Any]
    stored_rows: int = LENGTH
    tasks: bool = False
    deep: bool = False


CASES = {
    "prompt tuning, llama": Case("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **DECODER)),
    "prompt tuning, gpt2": Case("gpt2", lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **DECODER)),
    "p-tuning with an MLP": Case(
        "llama", lambda: peft.PromptEncoderConfig(num_virtual_tokens=LENGTH, encoder_hidden_size=24, **DECODER)
    ),
    "p-tuning with an LSTM": Case(
        "llama",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=LENGTH, encoder_hidden_size=24, encoder_reparameterization_type="LSTM", **DECODER
        ),
    ),
    "context-aware prompt tuning": Case(
        "llama",
        lambda: peft.CPTConfig(
            cpt_token_ids=[7, 9, 11, 40, 8],
            cpt_mask=[1] * LENGTH,
            cpt_tokens_type_mask=[1, 2, 2, 3, 4],
            opt_projection_epsilon=30.0,
            opt_projection_format_epsilon=30.0,
            **DECODER,
        ),
    ),
    "one task of multitask prompt tuning": Case(
        "llama",
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=LENGTH, num_ranks=2, **DECODER),
        tasks=True,
    ),
    "prefix tuning, keys of fewer heads": Case(
        "llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, **DECODER), deep=True
    ),
    "prefix tuning with a projection": Case(
        "gpt2",
        lambda: peft.PrefixTuningConfig(
            num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=24, **DECODER
        ),
        deep=True,
    ),
    "cartridge": Case(
        "llama", lambda: peft.CartridgeConfig(num_virtual_tokens=LENGTH, num_frozen_tokens=1, **DECODER), deep=True
    ),
    "prompt tuning, T5, rows for the decoder too": Case(
        "t5", lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **ENCODER_DECODER), stored_rows=2 * LENGTH
    ),
    "prompt tuning, T5, rows for the encoder": Case(
        "t5",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, num_transformer_submodules=1, **ENCODER_DECODER),
    ),
    "prompt tuning, BART, rows for the decoder too": Case(
        "bart", lambda: peft.PromptTuningConfig(num_virtual_tokens=LENGTH, **ENCODER_DECODER), stored_rows=2 * LENGTH
    ),
    "p-tuning, T5": Case(
        "t5",
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=LENGTH, encoder_hidden_size=24, **ENCODER_DECODER),
        stored_rows=2 * LENGTH,
    ),
    "one task of multitask prompt tuning, T5": Case(
        "t5",
        lambda: peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=LENGTH, num_ranks=2, num_transformer_submodules=1, **ENCODER_DECODER
        ),
        tasks=True,
    ),
}


def saved_by_peft(backbone: Backbone, config: Any, folder: Path) -> Path:
    """A folder as a training script leaves it, with trained values in place of PEFT's small initial ones."""
    model = peft.get_peft_model(copy.deepcopy(backbone.model), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def rows_of_other_lengths() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts, padded on the right, where padding shifts nothing in PEFT's layout."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    return torch.randint(3, 300, (3, 9), generator=generator) * mask + 2 * (1 - mask), mask


@torch.no_grad()
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_are_those_of_stock_peft(case: Case, tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    backbone = tiny_backbone(case.model)
    folder = saved_by_peft(backbone, case.config(), tmp_path)
    assert len(load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]) == case.stored_rows
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder)
    prompt = read_prompt(folder, backbone)
    assert len(prompt.prompt()) == LENGTH * prompt.num_matrices
    assert (prompt.is_deep) == case.deep
    ids, mask = rows_of_other_lengths()
    extra = {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if case.tasks else {}
    ours = attach(backbone, prompt.fold())
    matrix = torch.randn(2 * len(prompt.prompt()), prompt.prompt().shape[1], generator=torch.Generator().manual_seed(2))
    neighbor = Folded(matrix, num_matrices=prompt.num_matrices)
    mixed: dict[str, Any] = {"prompts": [neighbor, prompt.fold()], "index": torch.tensor([1, 1, 1, 0])}
    ids4, mask4 = torch.cat([ids, ids[:1]]), torch.cat([mask, mask[:1]])
    if backbone.architecture == "causal":
        expected = theirs(input_ids=ids, attention_mask=mask, **extra).logits[:, 0 if case.deep else LENGTH :][
            mask == 1
        ]
        actual = ours(ids, mask).logits[mask == 1]
        in_a_mixed_batch = ours(ids4, mask4, **mixed).logits[:3][mask == 1]
    else:
        labels = torch.tensor([[9, 40, 1], [12, 1, -100], [7, 8, 1]])
        real = labels != -100
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels, **extra).logits[real]
        actual = ours(ids, mask, labels).logits[real]
        in_a_mixed_batch = ours(ids4, mask4, torch.cat([labels, labels[:1]]), **mixed).logits[:3][real]
    bare = attach(backbone)(ids, mask, *(() if backbone.architecture == "causal" else (labels,))).logits
    without = bare[mask == 1] if backbone.architecture == "causal" else bare[real]
    assert not torch.allclose(without, expected, atol=1e-3)  # the prompt matters
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * size)
    # The tiny T5 amplifies rounding: PEFT's own float32 logits are up to 1.9e-5 of the largest from its float64 ones.
    rounding = 1e-5 if backbone.architecture == "causal" else 3e-5
    torch.testing.assert_close(in_a_mixed_batch, expected, rtol=0, atol=rounding * size)


REFUSED = {
    "prefix tuning of an encoder-decoder": (
        "t5",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, **ENCODER_DECODER),
        "is a PREFIX_TUNING adapter of an encoder-decoder, .* keys and values in the layers of decoders only",
    ),
    "LoRA": ("llama", lambda: peft.LoraConfig(**DECODER), r"is a LORA adapter, .* \(merge_and_unload\)"),
    "adaption prompt": (
        "llama",
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **DECODER),
        "is a ADAPTION_PROMPT adapter, which trains prompts inside the layers",
    ),
    "several tasks": (
        "llama",
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=LENGTH, num_tasks=3, **DECODER),
        "of 3 tasks, but a prompt is for one; make one of a single task",
    ),
    "rows in the decoder": (
        "t5",
        lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=LENGTH, **ENCODER_DECODER),
        "also puts vectors in front of the decoder's input, .* num_transformer_submodules=1",
    ),
}


@pytest.mark.parametrize(("model", "config", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_rows_cannot_express_is_refused_by_name(
    model: str, config: Callable[[], Any], sentence: str, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    backbone = tiny_backbone(model)
    peft.get_peft_model(copy.deepcopy(backbone.model), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        read_prompt(tmp_path, backbone)


@pytest.fixture
def saved(tiny_backbone: MakeBackbone, tmp_path: Path) -> Path:
    """Prompt tuning of the tiny Llama."""
    return saved_by_peft(tiny_backbone("llama"), CASES["prompt tuning, llama"].config(), tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task_type": "SEQ_CLS"}, "has the task type 'SEQ_CLS', but .* takes prompts of 'CAUSAL_LM'"),
        ({"task_type": None}, "has the task type None"),
        ({"num_layers": 12}, "was trained on a model of 12 layers, but .* has 2"),
        ({"num_virtual_tokens": 4}, r"is \(5, 32\), but its adapter_config.json states \(4, 32\)"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens in .* is None; it must be a number from 1 on"),
        ({"num_transformer_submodules": 2}, "is 2, but PEFT runs no model of the task type 'CAUSAL_LM' with as many"),
        ({"peft_type": "CARTRIDGE"}, r"is \(5, 32\), but its adapter_config.json states \(5, 128\)"),
        ({"peft_type": "VERA"}, "is a VERA adapter, which changes the model's own weights"),
        ({"peft_type": "PROMPT_TUNING_LORA"}, r"not stock PEFT's; read it with softprompt\.export\.read_dept"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "and no prefix_task_cols"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], sentence: str, saved: Path, tiny_backbone: MakeBackbone
) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=sentence):
        read_prompt(saved, tiny_backbone("llama"))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"prompt_embeddings": torch.full((LENGTH, 32), torch.inf)}, "a prompt is a matrix of finite numbers"),
        ({"prompt_embeddings": torch.zeros(LENGTH, 32, dtype=torch.float64)}, "in float64; a prompt is a matrix"),
        ({"prompt_embeddings": torch.zeros(LENGTH, 32, dtype=torch.int32)}, "in int32; a prompt is a matrix"),
        ({"prompt_embeddings": torch.zeros(LENGTH)}, r"is \(5,\); a prompt is a matrix"),
        ({"prompt_embeddings": torch.zeros(LENGTH, 16)}, r"is \(5, 16\), but its adapter_config.json states"),
        ({"embedding": torch.zeros(LENGTH, 32)}, "holds embedding and no prompt_embeddings"),
        (
            {"prompt_embeddings": torch.zeros(LENGTH, 32), "base_model.lm_head.weight": torch.zeros(3)},
            r"holds base_model\.lm_head\.weight besides a prompt; .* train it without modules_to_save",
        ),
    ],
)
def test_tensors_that_are_no_prompt_are_refused(
    tensors: dict[str, torch.Tensor], sentence: str, saved: Path, tiny_backbone: MakeBackbone
) -> None:
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        read_prompt(saved, tiny_backbone("llama"))


def test_prompt_of_another_width_names_its_base_model(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "token_dim": 48, **DECODER}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
    save_file({"prompt_embeddings": torch.ones(2, 48)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit: .* 48 wide, but .* \(other/model\)"):
        read_prompt(tmp_path, tiny_backbone("llama"))


def test_encoder_takes_no_prompt_of_pefts(saved: Path, tiny_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"goes in front of all tokens, but .* takes its prompt after \[CLS\]"):
        read_prompt(saved, tiny_backbone("bert_mlm"))


def test_another_base_model_is_noted(tiny_backbone: MakeBackbone, saved: Path) -> None:
    adapter, backbone = read_peft_folder(saved), tiny_backbone("llama")
    named = dataclasses.replace(adapter, config={**adapter.settings, "base_model_name_or_path": "org/Tiny-Llama"})
    assert named.base_note(dataclasses.replace(backbone, base="/models/tiny-llama")) == ""
    assert named.base_note("/models/Tiny-Llama") == ""
    note = f"{saved} was trained on org/Tiny-Llama; make sure that /models/other has the same weights"
    assert named.base_note("/models/other") == note
    known = dataclasses.replace(adapter, config={"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M"})
    assert known.base_note("smollm2-135m") == ""


def test_prompt_without_a_config_is_an_upload(saved: Path, tiny_backbone: MakeBackbone) -> None:
    (saved / "adapter_config.json").unlink()
    backbone = tiny_backbone("llama")
    expected = load_file(saved / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(read_prompt(saved, backbone).prompt(), expected)
