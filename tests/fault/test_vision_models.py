"""Models that are no plain vision transformer, and wrong calls of one that is, are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from softprompt import Backbone, Plain, load_backbone
from softprompt.models import attach, fresh_head
from softprompt.prompts import Folded

MakeBackbone = Callable[[str], Backbone]


def test_invalid_vision_call_is_refused(tiny_backbone: MakeBackbone, unchecked: None) -> None:
    backbone, pixels = tiny_backbone("vit"), torch.zeros(2, 3, 32, 32)
    head = fresh_head(backbone, 3, torch.Generator())
    with pytest.raises(ValueError, match="has no vocabulary head to answer with; give a head"):
        attach(backbone, None)
    with pytest.raises(ValueError, match="for 4 layers, but vit has 3"):
        attach(backbone, Folded(torch.zeros(8, 32), num_matrices=4), head=head)
    prompted = attach(backbone, Folded(torch.zeros(4, 32)), head=head)
    with pytest.raises(ValueError, match="the head has 3 classes and 2 candidates"):
        prompted.score(pixels, None, ((0,), (1,)))
    with pytest.raises(ValueError, match="images, which have no padding"):
        prompted(pixels, torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="does not generate"):
        prompted.generate(pixels)
    both = [Folded(torch.zeros(4, 32)), Folded(torch.zeros(12, 32), num_matrices=3)]
    with pytest.raises(ValueError, match=r"prompts of \[1, 3\] matrices are in one call"):
        prompted(pixels, prompts=both, index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="16 wide, but vit embeds in 32"):
        prompted(pixels, prompts=[Folded(torch.zeros(4, 16))])


def test_unsupported_vision_model_is_refused(tmp_path: Path) -> None:
    config = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=16, patch_size=4, window_size=2)
    transformers.SwinModel(config).save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match=r"swin.* is not a plain vision transformer"):
        load_backbone(str(tmp_path / "swin"), dtype="float32")
    gray = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_channels=1)
    transformers.ViTModel(gray).save_pretrained(tmp_path / "gray")
    with pytest.raises(ValueError, match="gray takes images of 1 channels"):
        load_backbone(str(tmp_path / "gray"), dtype="float32")


_TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.ViTMAEConfig(**_TINY, image_size=32, patch_size=8), "is not a plain vision transformer"),
        (transformers.BeitConfig(**_TINY, image_size=32, patch_size=8), "is not a plain vision transformer"),
        (
            transformers.BeitConfig(
                **_TINY,
                image_size=32,
                patch_size=8,
                use_absolute_position_embeddings=True,
                use_relative_position_bias=True,
            ),
            "is not a plain vision transformer",
        ),
        (
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]),
            "is not a plain vision transformer",
        ),
        (
            transformers.Wav2Vec2Config(
                **_TINY,
                conv_dim=[8],
                conv_stride=[2],
                conv_kernel=[3],
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            ),
            "has no table of token embeddings",
        ),
    ],
    ids=["vit_mae", "beit", "beit-relative", "resnet", "wav2vec2"],
)
def test_models_without_tokens_are_refused_by_name(config: Any, reason: str, tmp_path: Path) -> None:
    """Whatever their config has: BEiT and Wav2Vec2 have a vocab_size."""
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model \({config.model_type}\) {reason}"):
        load_backbone(str(tmp_path / "model"), dtype="float32")


def test_beit_with_absolute_positions_alone_takes_a_prompt(tmp_path: Path) -> None:
    config = transformers.BeitConfig(**_TINY, image_size=32, patch_size=8, use_absolute_position_embeddings=True)
    transformers.BeitModel(config).save_pretrained(tmp_path / "beit")
    backbone = load_backbone(str(tmp_path / "beit"), dtype="float32")
    [host] = backbone.hosts(1)
    prompted = attach(
        backbone, Plain(length=2).build(host, torch.Generator()), head=fresh_head(backbone, 3, torch.Generator())
    )
    assert prompted(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)
