"""DePT's published adapter format: read, written back and read again without loss."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from softprompt.export import read_dept, write_dept
from softprompt.prompts import Host
from softprompt.prompts.dept import DePT


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An adapter as their code writes it, with random numbers of the size of their T5-base ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "prompt_embeddings": 30 * torch.randn(6, 16, generator=generator),
        "prompt_encoder.lora_embedding_A": 0.2 * torch.randn(12, 3, generator=generator),
        "prompt_encoder.lora_embedding_B": 0.1 * torch.randn(3, 16, generator=generator),
    }
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "PROMPT_TUNING_LORA", "lora_alpha": 8, "r": 3, "max_length": 12, "num_virtual_tokens": 6}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_offset_matches_published_formula(published: Path) -> None:
    actual = read_dept(published)
    scale = 8 / 3**0.5
    expected = scale * actual.prompt.left @ actual.prompt.right
    assert_close(actual.prompt.offset(), expected)
    assert (actual.config.length, actual.config.rank, actual.config.positions) == (6, 3, 12)
    assert sum(p.numel() for p in actual.prompt.parameters()) == actual.config.count(16)


def test_adapter_round_trip_loses_nothing(published: Path, tmp_path: Path) -> None:
    first = read_dept(published)
    write_dept(first.config, first.prompt, "t5-base", tmp_path / "again")
    second = read_dept(tmp_path / "again")
    assert second.config == first.config
    for name, tensor in first.prompt.state_dict().items():
        assert torch.equal(tensor, second.prompt.state_dict()[name]), name


def test_own_scale_survives_export(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    host = Host(embedding=0.3 * torch.randn(50, 16, generator=generator), encode=lambda text: [1])
    config = DePT(length=5, rank=2, positions=9)
    prompt = config.build(host, generator)
    torch.nn.init.normal_(prompt.right, generator=generator)
    write_dept(config, prompt, "t5-base", tmp_path / "ours")
    actual = read_dept(tmp_path / "ours")
    assert_close(actual.prompt.prompt(), prompt.prompt())
    assert_close(actual.prompt.offset(), prompt.offset())  # float32 rounding of one product


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "'LORA' adapter"),
        (
            lambda folder: save_file({"prompt_embeddings": torch.ones(6, 16)}, folder / "adapter_model.safetensors"),
            "lora_embedding_A",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"), "not a complete safetensors"),
    ],
)
def test_invalid_adapter_is_refused_by_name(published: Path, break_it, message: str) -> None:
    break_it(published)
    with pytest.raises(ValueError, match=message):
        read_dept(published)
