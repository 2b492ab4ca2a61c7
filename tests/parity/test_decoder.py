"""The Llama layers with a backward pass of their own give what transformers' layers give, values and gradients."""

from collections.abc import Callable

import pytest
import torch
from cases import copy_of

from softprompt.backbones import Backbone
from softprompt.backbones.kernels import llama
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models import attach
from softprompt.prompts.plain import Plain

KNOWN = {"llama", "mistral"}


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3", "gemma", "opt"])
def test_it_is_used_for_the_layers_it_knows_and_no_others(tiny_backbone: Callable[[str], Backbone], name: str) -> None:
    assert llama.is_supported(tiny_backbone(name).model) == (name in KNOWN)


@pytest.mark.parametrize("name", sorted(KNOWN))
@pytest.mark.parametrize("places", [[[2], [0], [4]], [[1, 2], [-1, 0], [3, 4]]])
def test_values_and_gradients(tiny_backbone: Callable[[str], Backbone], name: str, places: list[list[int]]) -> None:
    """Against the same packed tokens through transformers' own layers; seen failing with a sine of the wrong sign."""
    backbone = tiny_backbone(name)
    assert llama.is_supported(backbone.model)
    draw = torch.Generator().manual_seed(0)
    packing = VarlenLayout([4, 2], [3, 1, 5], torch.tensor([1, 0, 1]))
    embeds = (torch.randn(15, backbone.dim, generator=draw) * backbone.host().rms).requires_grad_()
    at = torch.tensor(places)
    found = llama.run(backbone.model, embeds, packing, at)
    keep = torch.where(at < 0, torch.tensor([[5], [3], [5]]), torch.tensor([[6], [9], [10]]) + at)
    whole = (
        backbone.model(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=packing.positions,
            use_cache=False,
            logits_to_keep=keep.flatten(),
            layout=packing,
        )
        .logits[0]
        .view_as(found)
    )
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    weights = torch.randn(whole.shape, generator=draw)
    ours, theirs = (torch.autograd.grad((one * weights).sum(), embeds)[0] for one in (found, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_gradients_in_bfloat16_are_no_worse(
    tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error of the prompt's gradient against float32, beside that of transformers' layers in bfloat16."""
    backbone = copy_of(tiny_backbone("llama"), torch.float32)
    ids = torch.randint(3, 300, (8, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]

    def gradient(dtype: torch.dtype, known: bool) -> torch.Tensor:
        backbone.model.to(dtype)
        prompt = Plain(length=20).build(backbone.host(), torch.Generator().manual_seed(0))
        monkeypatch.setattr(llama, "is_supported", lambda _: known)
        prompted = attach(backbone, prompt)
        prompted(ids, labels=labels).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in prompt.parameters()])

    exact = gradient(torch.float32, False)
    ours, theirs = (float((gradient(torch.bfloat16, known) - exact).norm()) for known in (True, False))
    assert ours < 1.2 * theirs
