"""The fused Llama layers equal transformers' layers, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from cases import copy_of

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import llama
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models import attach
from softprompt.prompts.plain import Plain

SUPPORTED = {"llama", "mistral"}


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3", "gemma", "opt"])
def test_is_supported_only_for_known_layers(tiny_backbone: Callable[[str], Backbone], name: str) -> None:
    assert llama.is_supported(tiny_backbone(name).model) == (name in SUPPORTED)


@pytest.mark.parametrize("name", sorted(SUPPORTED))
@pytest.mark.parametrize("positions", [[[2], [0], [4]], [[1, 2], [-1, 0], [3, 4]]])
def test_run_equals_transformers_layers(
    tiny_backbone: Callable[[str], Backbone], name: str, positions: list[list[int]]
) -> None:
    """Against the same packed tokens through transformers' own layers; seen failing with a sine of the wrong sign."""
    backbone = tiny_backbone(name)
    assert llama.is_supported(backbone.model)
    generator = torch.Generator().manual_seed(0)
    layout = VarlenLayout([4, 2], [3, 1, 5], torch.tensor([1, 0, 1]))
    embeds = (torch.randn(15, backbone.dim, generator=generator) * backbone.host().rms).requires_grad_()
    index = torch.tensor(positions)
    logits = llama.run(backbone.model, embeds, layout, index)
    keep = torch.where(index < 0, torch.tensor([[5], [3], [5]]), torch.tensor([[6], [9], [10]]) + index)
    expected = (
        backbone.model(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=layout.positions,
            use_cache=False,
            logits_to_keep=keep.flatten(),
            layout=layout,
        )
        .logits[0]
        .view_as(logits)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), embeds)[0] for output in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_bfloat16_gradient_as_accurate_as_transformers(
    tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the prompt's gradient against float32, compared with that of transformers' layers in bfloat16."""
    backbone = copy_of(tiny_backbone("llama"), torch.float32)
    ids = torch.randint(3, 300, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]

    def gradient(dtype: torch.dtype, fused: bool) -> torch.Tensor:
        backbone.model.to(dtype)
        prompt = Plain(length=20).build(backbone.host(), torch.Generator().manual_seed(0))
        monkeypatch.setattr(llama, "is_supported", lambda _: fused)
        prompted = attach(backbone, prompt)
        prompted(ids, labels=labels).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in prompt.parameters()])

    exact = gradient(torch.float32, False)
    ours, theirs = (float((gradient(torch.bfloat16, fused) - exact).norm()) for fused in (True, False))
    assert ours < 1.2 * theirs
