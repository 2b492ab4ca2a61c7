"""Adapters from elsewhere: pickled, incomplete or damaged, and what is said of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from softprompt import load_backbone
from softprompt.export import read_dept
from softprompt.runs import read_prompt

TENSORS = {
    "prompt_embeddings": torch.ones(6, 16),
    "prompt_encoder.lora_embedding_A": torch.ones(12, 3),
    "prompt_encoder.lora_embedding_B": torch.ones(3, 16),
}
SETTINGS = {"peft_type": "PROMPT_TUNING_LORA", "lora_alpha": 8, "r": 3, "max_length": 12, "num_virtual_tokens": 6}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_pickled_adapter_is_read_like_a_safe_one(adapter: Path):
    torch.save(TENSORS, adapter / "adapter_model.bin")
    pickled = read_dept(adapter)
    (adapter / "adapter_model.bin").unlink()
    save_file(TENSORS, adapter / "adapter_model.safetensors")
    safe = read_dept(adapter)
    assert pickled.config == safe.config
    assert torch.equal(pickled.prompt.offset(), safe.prompt.offset())


def test_code_in_a_pickled_adapter_never_runs(adapter: Path):
    torch.save({**TENSORS, "more": Harmful(adapter / "RAN")}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is damaged, or holds more than tensors"):
        read_dept(adapter)
    assert not (adapter / "RAN").exists()


def test_an_incomplete_adapter_is_not_called_a_run(adapter: Path):
    with pytest.raises(FileNotFoundError, match="does not exist; save the adapter again, or fetch it again"):
        read_dept(adapter)


def test_a_cut_adapter_is_not_called_a_run(adapter: Path):
    torch.save(TENSORS, adapter / "adapter_model.bin")
    (adapter / "adapter_model.bin").write_bytes((adapter / "adapter_model.bin").read_bytes()[:200])
    with pytest.raises(ValueError, match="save the adapter again"):
        read_dept(adapter)


def test_settings_without_a_scale_are_refused(adapter: Path):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING_LORA"}))
    save_file(TENSORS, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lacks 'lora_alpha'"):
        read_dept(adapter)


def test_a_pickled_plain_prompt_starts_a_run(tmp_path: Path, llama_folder: Path):
    torch.save({"prompt_embeddings": torch.ones(4, 32)}, tmp_path / "adapter_model.bin")
    backbone = load_backbone(str(llama_folder), dtype="float32")
    assert torch.equal(read_prompt(tmp_path, backbone).fold().prompt(), torch.ones(4, 32))
