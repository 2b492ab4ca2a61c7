"""Somebody else's mixed precision: in an autocast region every family trains, near what float32 gives."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from cases import attached, loss_of

from softprompt.backbones import Backbone
from softprompt.models import attach
from softprompt.prompts.dpt import DPT
from softprompt.types import PromptAttention

MakeBackbone = Callable[[str], Backbone]
FAMILIES = ("llama", "gpt2", "bloom", "gemma2", "t5", "bart", "bert", "bert_mlm", "roberta", "vit", "dinov2")
ISOLATED = ("t5", "bert", "bert_mlm")
CASES = [(name, "full") for name in FAMILIES] + [(name, "self") for name in ISOLATED]


def _gradients(prompted: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in prompted.parameters()])


@pytest.mark.parametrize("outside", [False, True], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize(("name", "prompt_attention"), CASES)
def test_loss_under_autocast_is_near_float32(
    name: str, prompt_attention: PromptAttention, outside: bool, tiny_backbone: MakeBackbone
) -> None:
    backbone = tiny_backbone(name)
    reference = attached(backbone, prompt_attention)
    expected = loss_of(reference)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        prompted = attached(backbone, prompt_attention)
        loss = loss_of(prompted)
        if not outside:
            loss.backward()
    if outside:
        loss.backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in prompted.parameters())
    assert float(loss - expected) != 0, "nothing was cast"
    assert abs(float(loss) / float(expected) - 1) < 0.05
    if name == "t5":  # unscaled scores of large weights: its gradient in bfloat16 is noise in torch's own kernel too
        return
    near = torch.nn.functional.cosine_similarity(_gradients(prompted), _gradients(reference), dim=0)
    assert float(near) > 0.9


@pytest.mark.parametrize("name", ["llama", "t5", "bert_mlm"])
def test_graph_built_outside_autocast_backprops_inside(name: str, tiny_backbone: MakeBackbone) -> None:
    reference, prompted = (attached(tiny_backbone(name), "full") for _ in range(2))
    loss_of(reference).backward()
    loss = loss_of(prompted)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    near = torch.nn.functional.cosine_similarity(_gradients(prompted), _gradients(reference), dim=0)
    assert float(near) > 0.99


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generation_under_autocast(name: str, tiny_backbone: MakeBackbone) -> None:
    prompted = attached(tiny_backbone(name), "full")
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        prepared = prompted.prepare([prompted.prompt])
        made = list(prompted.generate(ids, max_new_tokens=3, stop=[], prompts=prepared))
        scores = prompted.score(ids, None, [(5, 6), (7,)], prepared)
    assert len(made) == 3
    with torch.no_grad():
        expected = prompted.score(ids, None, [(5, 6), (7,)])
    torch.testing.assert_close(scores.float(), expected, rtol=0.05, atol=0.3)


class _Rows(torch.utils.data.Dataset[Mapping[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> Mapping[str, torch.Tensor]:
        ids = torch.arange(10, 22) + position
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_transformers_trainer_in_bfloat16(tiny_backbone: MakeBackbone, tmp_path: Any) -> None:
    backbone = tiny_backbone("llama")
    prompted = attach(backbone, DPT(length=6, rank=2).build(backbone.host(), torch.Generator().manual_seed(0)))
    first = {name: value.clone() for name, value in prompted.state_dict().items()}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    trainer = transformers.Trainer(model=prompted, args=settings, train_dataset=_Rows())
    assert trainer.train().training_loss > 0
    assert all(value.isfinite().all() for value in prompted.state_dict().values())
    assert any(bool((prompted.state_dict()[name] != value).any()) for name, value in first.items())
