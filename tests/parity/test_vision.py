"""A prompt in a vision transformer is that model run on a row written by hand."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softprompt import Plain
from softprompt.backbones import Backbone
from softprompt.backbones.projections import query_key
from softprompt.models import attach, fresh_head
from softprompt.models.vision import Vision
from softprompt.prompts import Folded
from softprompt.prompts.bpt import BPT, whitening
from softprompt.prompts.deep import Deep

MakeBackbone = Callable[[str], Backbone]
LEAD = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_registers": 3}
backbones = pytest.mark.parametrize("name", LEAD)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 3, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=seeded(0))


def attached(backbone: Backbone, prompt: Any, pool: Any = "cls") -> Vision:
    actual = attach(backbone, prompt, head=fresh_head(backbone, 4, seeded(1), pool))
    assert isinstance(actual, Vision)
    return actual


def stack(model: Any) -> list[nn.Module]:
    return list(model.layers if hasattr(model, "layers") else model.encoder.layer)


def by_hand(name: str, model: Any, pixels: Tensor, prompts: list[Tensor]) -> Tensor:
    """Jia et al.'s loop, on one row at a time; the prompts' own last states are cut out."""
    embeddings = model.embeddings(pixels) if "dino" in name else model.embeddings(pixels, interpolate_pos_encoding=True)
    lead, length, rows = LEAD[name], len(prompts[0]), []
    for row in embeddings:
        states = torch.cat([row[:lead], prompts[0], row[lead:]])[None]
        for number, layer in enumerate(stack(model)):
            if 0 < number < len(prompts):
                states = torch.cat([states[:, :lead], prompts[number][None], states[:, lead + length :]], 1)
            states = layer(states)
        rows.append(model.layernorm(torch.cat([states[:, :lead], states[:, lead + length :]], 1)))
    return torch.cat(rows)


def close(ours: Tensor, theirs: Tensor) -> None:
    # float32, one row at a time against a batch.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


@backbones
@pytest.mark.parametrize("size", [(32, 32), (16, 16), (40, 24)])
def test_bare_vision_model_is_the_model(name: str, size: tuple[int, int], tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    pixels = images(2, *size)
    given = {} if "dino" in name else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        full = backbone.model(pixel_values=pixels, **given).last_hidden_state
        for prompts in ([], [Folded(torch.zeros(0, 32))], [Folded(torch.zeros(0, 32), num_matrices=3)]):
            close(attached(backbone, None).hidden_states(pixels, prompts), full)


@backbones
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_prompt_matches_row_by_hand(name: str, num_layers: int, tiny_backbone: MakeBackbone) -> None:
    """States, and the gradient that reaches every vector."""
    backbone = tiny_backbone(name)
    vectors = [torch.randn(5, 32, generator=seeded(layer)).requires_grad_() for layer in range(num_layers)]
    theirs = by_hand(name, backbone.model, images(), vectors)
    prompt = Folded(torch.cat(vectors), num_matrices=num_layers)
    ours = attached(backbone, None).hidden_states(images(), [prompt])
    close(ours, theirs)
    weights = torch.randn(theirs.shape, generator=seeded(9))
    actual = torch.autograd.grad((ours * weights).sum(), vectors, retain_graph=True)
    for mine, expected in zip(actual, torch.autograd.grad((theirs * weights).sum(), vectors), strict=True):
        close(mine, expected)


@backbones
def test_head_takes_cls_or_mean_of_patches(name: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    prompt = Folded(torch.randn(5, 32, generator=seeded(2)))
    with torch.no_grad():
        states = by_hand(name, backbone.model, images(), [prompt.prompt()])
        for pool, expected in (("cls", states[:, 0]), ("patches", states[:, LEAD[name] :].mean(1))):
            actual = attached(backbone, prompt, pool)
            assert isinstance(actual.head, nn.Sequential)
            close(actual(images()).logits, expected @ actual.head[1].weight.T + actual.head[1].bias)


@backbones
@pytest.mark.parametrize("num_layers", [1, 3])
def test_several_prompts_in_one_call_are_independent(name: str, num_layers: int, tiny_backbone: MakeBackbone) -> None:
    """Of unequal length: what fills the shorter one up is not seen."""
    backbone = tiny_backbone(name)
    prompts = [
        Folded(torch.randn(num_layers * length, 32, generator=seeded(length)), num_matrices=num_layers)
        for length in (3, 7, 5)
    ]
    prompted = attached(backbone, None)
    index = torch.tensor([1, 0, 2])
    with torch.no_grad():
        batched = prompted(images(), prompts=prompts, index=index).logits
        prepared = prompted(images(), prompts=prompted.prepare(prompts), index=index).logits
        for row, which in enumerate(index):
            single_row = prompted(images()[row : row + 1], prompts=[prompts[int(which)]]).logits
            close(batched[row : row + 1], single_row)
    torch.testing.assert_close(prepared, batched, rtol=0, atol=0)


def eager_copy(backbone: Backbone) -> Backbone:
    model = copy.deepcopy(backbone.model)
    model.set_attn_implementation("eager")
    return dataclasses.replace(backbone, model=model)


@backbones
def test_eager_attention_hides_padding_of_shorter_prompts(name: str, tiny_backbone: MakeBackbone) -> None:
    """The model's own attention adds its mask, so True and False would only be 1 and 0 more."""
    backbone = eager_copy(tiny_backbone(name))
    prompts = [Folded(torch.randn(length, 32, generator=seeded(length))) for length in (2, 20)]
    prompted = attached(backbone, None)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            states = prompted.hidden_states(images(2), prompts, torch.tensor([0, 1]))
            for row, prompt in enumerate(prompts):
                expected = by_hand(name, backbone.model, images(2)[row : row + 1], [prompt.prompt()])
                close(states[row : row + 1], expected)


def test_attention_that_ignores_masks_is_refused(tiny_backbone: MakeBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = eager_copy(tiny_backbone("vit"))
    monkeypatch.setattr("softprompt.backbones.vit.attention_mask", lambda model, visible, dtype: visible.to(dtype))
    with pytest.raises(ValueError, match="gives different states with prompts of unequal length in one batch"):
        attached(backbone, None)


def test_loss_and_score_are_cross_entropy(tiny_backbone: MakeBackbone) -> None:
    prompted = attached(tiny_backbone("dinov2"), Folded(torch.randn(2, 32, generator=seeded(3))))
    labels = torch.tensor([[1], [-100], [3]])
    with torch.no_grad():
        actual = prompted(images(), labels=labels)
        scores = prompted.score(images(), None, [(0,), (1,), (2,), (3,)])
    torch.testing.assert_close(scores, actual.logits.log_softmax(1))
    torch.testing.assert_close(actual.loss, -(scores[0, 1] + scores[2, 3]) / 2)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_layer_host_has_that_layers_inputs(name: str, tiny_backbone: MakeBackbone) -> None:
    """Its patches' states in the model as it is, and its own query and key weights."""
    backbone = tiny_backbone(name).with_sample_images(images(2))
    visible: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: visible.append(inputs[0])) for layer in stack(backbone.model)
    ]
    with torch.no_grad():
        backbone.model(pixel_values=images(2))
    for hook in hooks:
        hook.remove()
    hosts = backbone.hosts(3)
    for number, (host, states) in enumerate(zip(hosts, visible, strict=True)):
        expected = states[:, 1:].flatten(0, 1)
        assert host.embedding.shape == expected.shape
        nearest = torch.cdist(host.embedding, expected, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        assert float(nearest.max()) < 1e-4 * float(expected.norm(dim=1).mean())
        assert host.query_key is not None
        torch.testing.assert_close(
            host.query_key(), query_key(backbone.model, stack(backbone.model)[number]).product(), rtol=0, atol=0
        )
    products = [host.query_key() for host in hosts if host.query_key is not None]
    assert not torch.equal(products[0], products[1])


def test_whitening_uses_patches_after_layer_weights(tiny_backbone: MakeBackbone) -> None:
    """`W = (Sigma + eps I)^(-1/2)` of `W_q W_k^T x`, written out; and the covariance of what it whitens."""
    [host] = tiny_backbone("vit").with_sample_images(torch.randn(40, 3, 32, 32, generator=seeded(4))).hosts(1)
    config = BPT(length=4, mode="frozen", scale=1.0, samples=640, eps=1e-9)
    right = config.build(host, seeded(0)).right.double()
    attention = stack(tiny_backbone("vit").model)[0].attention
    product = (attention.q_proj.weight.T @ attention.k_proj.weight).double()  # type: ignore[union-attr, operator]
    rows = host.embedding.double() @ product.T
    white = rows @ right
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(32).double(), rtol=0, atol=1e-3)
    plain = config.replace(through="inputs").build(host, seeded(0)).right
    torch.testing.assert_close(
        plain, whitening(host.embedding, 1e-9).T, rtol=1e-3, atol=1e-3 * float(plain.abs().max())
    )


def test_whitening_float32_handles_rank_deficient_sample() -> None:
    rows = torch.randn(4096, 64, generator=seeded(0)) @ torch.randn(64, 64, generator=seeded(1))
    white = rows @ whitening(rows, 1e-9)
    assert white.dtype is torch.float32
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(64), rtol=0, atol=1e-3)
    poor = rows[:10]  # ten vectors cannot fill sixty-four directions
    assert bool(whitening(poor, 1e-3).isfinite().all())
    assert float((poor @ whitening(poor, 1e-3)).abs().max()) < 100


def test_bilinear_columns_come_from_whitening_matrix(tiny_backbone: MakeBackbone) -> None:
    [host] = tiny_backbone("dinov2").hosts(1)
    full = BPT(length=4, mode="frozen", scale=1.0).build(host, seeded(0)).right
    some = BPT(length=4, rank=5, init="whitening", scale=1.0, samples=4096).build(host, seeded(0)).right
    assert some.shape == (5, 32)
    # The two draw another sample of the same 256 vectors, in another order.
    gaps = torch.cdist(some.detach(), full).min(1).values
    assert float(gaps.max()) < 0.05 * float(full.norm(dim=1).mean())


@pytest.mark.parametrize(("config", "count"), [(Plain(length=100), 76_800), (BPT(length=100, rank=75), 65_100)])
def test_deep_prompt_has_one_prompt_per_layer(config: Any, count: int, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("vit")
    assert config.count(768) == count
    deep = Deep([config.build(host, seeded(0)) for host in backbone.hosts(3)])
    assert sum(parameter.numel() for parameter in deep.parameters()) == 3 * config.count(32)
    assert deep.prompt().shape == (300, 32)
    assert deep.fold().num_matrices == 3
    torch.testing.assert_close(deep.fold().prompt()[100:200], deep.layers[1].prompt())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "takes"), [("t5", "shallow prompts only"), ("gpt2", "shallow prompts, and deep ones of 4 matrices")]
)
def test_text_model_refuses_deep_prompt_of_a_vision_model(name: str, takes: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    with pytest.raises(ValueError, match=f"the prompt is deep, of 2 matrices, but {name} takes {takes}"):
        attach(backbone, Folded(torch.zeros(4, 32), num_matrices=2))(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match=f"a prompt of 3 matrices does not fit {name}, which takes {takes}"):
        backbone.hosts(3)
