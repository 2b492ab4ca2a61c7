"""Hooks and adapters in a Llama take part: then its layers run as transformers' own, and not through our fused ones."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from softprompt import Backbone, attach
from softprompt.backbones.kernels import llama
from softprompt.prompts import Folded

IDS = torch.tensor([[2, 2, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LABELS = torch.where(MASK == 1, IDS, -100)


@pytest.fixture
def backbone(tiny_backbone: Callable[[str], Backbone]) -> Backbone:
    own = tiny_backbone("llama")
    return dataclasses.replace(own, model=copy.deepcopy(own.model))


def reference(backbone: Backbone, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradient and last logits of each row alone, as one sequence of vectors through the model's forward."""
    matrix = matrix.clone().requires_grad_()
    losses, last = [], []
    for ids, real in zip(IDS, MASK, strict=True):
        ids = ids[real == 1]
        embeds = torch.cat([matrix, backbone.model.get_input_embeddings()(ids)])[None]
        logits = backbone.model(inputs_embeds=embeds).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[len(matrix) - 1 : -1], ids, reduction="sum"))
        last.append(logits[-1])
    [gradient] = torch.autograd.grad(torch.stack(losses).sum(), matrix)
    return torch.stack(losses).detach(), gradient, torch.stack(last).detach()


def negate(module: Any, inputs: Any, output: Any) -> Any:
    return tuple(-part if isinstance(part, Tensor) else part for part in output) if type(output) is tuple else -output


def put_adapter_in(model: Any) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "v_proj": lambda model: model.model.layers[0].self_attn.v_proj.register_forward_hook(negate),
    "down_proj": lambda model: model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, given: -given[0]
    ),
    "mlp": lambda model: model.model.layers[0].mlp.register_forward_hook(negate),
    "norm": lambda model: model.model.layers[0].input_layernorm.register_forward_hook(negate),
    "layer": lambda model: model.model.layers[0].register_forward_hook(negate),
    "forward": lambda model: setattr(model.model.layers[0].mlp, "forward", lambda states: states * 2),
    "adapter": put_adapter_in,
}


@pytest.mark.parametrize("before", [True, False], ids=["before attach", "after attach"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_give_what_the_model_gives(change: str, before: bool, backbone: Backbone) -> None:
    """Seen failing for each change but an adapter that is there before attaching."""
    matrix = backbone.host().sample(3, torch.Generator().manual_seed(0))
    trained = matrix.clone().requires_grad_()
    prompted = attach(backbone, Folded(trained))
    bare = prompted.losses(IDS, MASK, LABELS).detach()
    CHANGES[change](backbone.model)
    if before:
        prompted = attach(backbone, Folded(trained))
    losses, gradient, last = reference(backbone, matrix)
    assert not torch.allclose(losses, bare, rtol=1e-3)
    actual = prompted.losses(IDS, MASK, LABELS)
    torch.testing.assert_close(actual.detach(), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(actual.sum(), trained)[0], gradient, rtol=1e-3, atol=1e-4)
    [token] = prompted.generate(IDS, MASK, max_new_tokens=1)
    assert torch.equal(token, last.argmax(-1))
    scores = prompted.score(IDS, MASK, ((20,), (21,)))
    torch.testing.assert_close(scores, last.log_softmax(-1)[:, [20, 21]], rtol=1e-4, atol=1e-4)


def test_removed_hook_gives_the_fused_layers_back(backbone: Backbone) -> None:
    attach(backbone)
    hook = backbone.model.model.layers[0].mlp.register_forward_hook(negate)
    assert not llama.is_intact(backbone.model)
    hook.remove()
    assert llama.is_intact(backbone.model)
