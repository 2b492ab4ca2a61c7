"""What every method must keep on every architecture; both lists are whole, so a new method is tested as it is."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from softprompt.backbones import Backbone
from softprompt.models import PromptedModel, attach, fresh_head
from softprompt.prompts import METHODS, SoftPrompt

BACKBONES = ("llama", "gpt2", "qwen3", "t5", "bart", "bert_mlm", "roberta_mlm", "roberta", "mpnet")
CANDIDATES = ((40,), (41,), (42,))
SMALL = {"length": 5, "rank": 2, "width": 4, "positions": 30}
"""Settings that keep a method tiny, where it has them."""

methods = pytest.mark.parametrize("method", sorted(METHODS))
backbones = pytest.mark.parametrize("name", BACKBONES)
MakeBackbone = Callable[[str], Backbone]


def prompt_of(method: str, backbone: Backbone) -> SoftPrompt:
    """A prompt moved off its first values, so that every part of it does something."""
    config = METHODS[method]()
    config = config.replace(**{name: value for name, value in SMALL.items() if hasattr(config, name)})
    prompt = config.build(backbone.host(("yes", "no")), torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return prompt.eval()


def attachment_of(method: str, backbone: Backbone) -> PromptedModel:
    head = fresh_head(backbone, len(CANDIDATES), torch.Generator().manual_seed(2))
    return attach(backbone, prompt_of(method, backbone), head=head)


def batch(extra: int = 0, side: str = "left") -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    counts = (6, 3, 8, 1)
    ids, mask = torch.full((4, 8 + extra), 2), torch.zeros(4, 8 + extra, dtype=torch.long)
    for row, count in enumerate(counts):
        start = 8 + extra - count if side == "left" else 0
        ids[row, start : start + count] = torch.randint(5, 300, (count,), generator=draw)
        mask[row, start : start + count] = 1
    return ids, mask


def labels_of(prompted: PromptedModel, ids: Tensor) -> Tensor:
    """Labels of the shape that the attachment wants."""
    if not prompted.appends_eos:
        return ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
    if prompted.backbone.architecture == "encoder":
        return torch.tensor([[0], [2], [1], [1]])
    return torch.tensor([prompted.target((40 + row,)) for row in range(len(ids))])


@methods
@backbones
def test_forward_and_score_do_not_depend_on_padding(method: str, name: str, tiny_backbone: MakeBackbone) -> None:
    prompted = attachment_of(method, tiny_backbone(name))
    ids, mask = batch()
    output = prompted(ids, mask, labels_of(prompted, ids))
    assert output.loss.dtype == torch.float32
    assert output.logits.shape[0] == 4
    scores = prompted.score(ids, mask, CANDIDATES)
    assert scores.shape == (4, 3)
    assert bool((scores <= 0).all())
    for extra, side in ((1, "left"), (40, "left"), (0, "right"), (40, "right")):
        reloaded = prompted.score(*batch(extra, side), CANDIDATES)
        # float32 sums over other shapes, at logits of order 10.
        torch.testing.assert_close(reloaded, scores, rtol=1e-4, atol=1e-4)


@methods
@backbones
def test_live_equals_folded(method: str, name: str, tiny_backbone: MakeBackbone) -> None:
    prompted = attachment_of(method, tiny_backbone(name))
    assert prompted.prompt is not None
    folded = attach(prompted.backbone, prompted.prompt.fold(), head=prompted.head)
    assert not list(folded.prompt.parameters())  # type: ignore[union-attr]
    ids, mask = batch()
    live = prompted.score(ids, mask, CANDIDATES)
    # The tables of DePT and ADePT are the live numbers in another order of summation.
    torch.testing.assert_close(
        folded.score(ids, mask, CANDIDATES), live, rtol=1e-5, atol=1e-5 * float(live.abs().max())
    )


@methods
@backbones
def test_step_changes_prompt_and_head_not_backbone(method: str, name: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    prompted, before = attachment_of(method, backbone), backbone.checksum()
    assert (prompted.head is not None) == (name in ("roberta", "mpnet"))
    named = dict(prompted.named_parameters())
    grouped = [id(parameter) for group in prompted.groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in named.values())
    assert all(key.startswith(("prompt.", "head.")) for key in prompted.state_dict())
    training_step = torch.optim.Adam(prompted.parameters(), lr=0.01)
    first = {key: parameter.detach().clone() for key, parameter in named.items()}
    ids, mask = batch()
    loss = nn.functional.cross_entropy(prompted.score(ids, mask, CANDIDATES), torch.tensor([0, 2, 1, 1]))
    loss.backward()
    training_step.step()
    for key, parameter in named.items():
        assert parameter.grad is not None, key
        assert math.isfinite(float(parameter.grad.norm())), key
        assert not torch.equal(parameter, first[key]), key
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert backbone.checksum() == before


@pytest.mark.parametrize(("name", "copied"), [("llama", False), ("t5", False), ("gemma", True), ("bart", True)])
def test_host_embedding_is_copied_only_where_scaled(name: str, copied: bool, tiny_backbone: MakeBackbone) -> None:
    """Gemma and this BART scale what they read from the table; a copy of a large one would take as much as a model."""
    backbone = tiny_backbone(name)
    module, host = backbone.model.get_input_embeddings(), backbone.host()
    with torch.no_grad():
        assert torch.equal(host.embedding, module(torch.arange(len(module.weight))))
    assert (host.embedding.data_ptr() != module.weight.data_ptr()) == copied
    assert math.isclose(host.rms, float(host.embedding.double().square().mean().sqrt()), rel_tol=1e-9)
