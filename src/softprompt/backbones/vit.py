"""A vision transformer's parts (ViT, DeiT, DINOv2), whatever transformers calls them, and what it tells a prompt."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.backbones import projections
from softprompt.prompts import Host

Pixels = Float[Tensor, "image channel height width"]
States = Float[Tensor, "image token dim"]

_MOST_VECTORS = 4096
"""Input vectors that a host keeps a layer."""


def refuse_unknown(model: Any, source: str) -> None:
    """Refuse a model that is no plain vision transformer.

    Raises:
        ValueError: it has not the parts that a prompt needs, or sees no colours.
    """
    embeddings = getattr(model, "embeddings", None)
    parts = (getattr(embeddings, "patch_embeddings", None), getattr(model, "layernorm", None), _layers(model))
    plain = hasattr(embeddings, "cls_token") and hasattr(embeddings, "position_embeddings")
    if not plain or any(part is None for part in parts):
        raise ValueError(
            f"{source} ({model.config.model_type}) is no plain vision transformer with a [CLS] token, learned "
            "positions and one stack of layers; choose a ViT, DeiT or DINOv2"
        )
    if (channels := model.config.num_channels) != 3:
        raise ValueError(
            f"{source} sees images of {channels} channels and they are read in three; choose another model"
        )


def without_pooler(config: Any) -> dict[str, bool]:
    """How to load it without a pooler, which a checkpoint may lack: made up at random it changes at every load."""
    kind = transformers.MODEL_MAPPING.get(type(config), object)
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}


def layers(model: Any) -> Sequence[nn.Module]:
    """The stack, from the first layer to the last."""
    found = _layers(model)
    assert found is not None  # see refuse_unknown
    return list(found)


def _layers(model: Any) -> Any:
    return getattr(model, "layers", getattr(getattr(model, "encoder", None), "layer", None))


def lead(model: Any) -> int:
    """Tokens in front of the patches: [CLS], DeiT's distillation token, DINOv2's registers."""
    distilled = hasattr(model.embeddings, "distillation_token")
    return 1 + int(distilled) + int(getattr(model.config, "num_register_tokens", 0))


def patch(model: Any) -> int:
    """A patch's side in pixels."""
    size = model.config.patch_size
    return int(size if isinstance(size, int) else size[0])


def embed(model: Any, pixels: Pixels) -> States:
    """What the first layer sees: leading tokens and patches with their positions, interpolated to the image's size.

    Raises:
        ValueError: the image is no whole number of patches.
    """
    side = patch(model)
    if pixels.shape[2] % side or pixels.shape[3] % side:
        near = max(round(pixels.shape[3] / side), 1) * side
        raise ValueError(
            f"an image of {pixels.shape[3]} x {pixels.shape[2]} pixels is no whole number of patches of {side}; "
            f"give an image size of {near}"
        )
    own = model.embeddings
    given = {"interpolate_pos_encoding": True} if _takes(own, "interpolate_pos_encoding") else {}
    states: Tensor = own(pixels.to(next(own.parameters()).dtype), **given)
    return states


def _takes(module: Any, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def run(model: Any, pixels: Pixels) -> States:
    """The model's own last states, normalised, of its own forward."""
    given = {"interpolate_pos_encoding": True} if _takes(model, "interpolate_pos_encoding") else {}
    states: Tensor = model(pixel_values=pixels.to(next(model.parameters()).dtype), **given).last_hidden_state
    return states


def through(layer: nn.Module, states: States, mask: Tensor | None = None) -> States:
    """One layer."""
    found = layer(states, mask)
    return found if isinstance(found, Tensor) else found[0]


def hosts(
    model: Any,
    images: Pixels | None,
    depth: int,
    label_words: tuple[str, ...],
    start: Float[Tensor, "prompt dim"] | None,
) -> list[Host]:
    """What a prompt may know of the first `depth` layers, a host each: the patches' states are its input vectors.

    Args:
        images: to sample them from; none: noise, which gives their shape and a rough size.
        start: a trained prompt to start from, all layers one behind another.
    """
    stack = layers(model)[:depth]
    starts: Sequence[Tensor | None] = [None] * depth if start is None else start.chunk(depth)
    samples = _samples(model, stack, _noise(model) if images is None else images)
    return [
        Host(
            embedding=sample,
            encode=_no_text,
            label_words=label_words,
            start=part,
            query_key=projections.product_of(model, layer),
        )
        for layer, sample, part in zip(stack, samples, starts, strict=True)
    ]


@torch.no_grad()
def _samples(model: Any, stack: Sequence[nn.Module], images: Pixels) -> list[Float[Tensor, "vector dim"]]:
    """Patches' states in front of each layer of the model as it is, float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    parts = [embed(model, part.to(device)) for part in torch.split(images, 16)]
    found = []
    for before in (None, *stack[:-1]):
        if before is not None:
            parts = [through(before, part) for part in parts]
        vectors = torch.cat([part[:, lead(model) :].flatten(0, 1).float().cpu() for part in parts])
        chosen = torch.randperm(len(vectors), generator=generator)[:_MOST_VECTORS]
        found.append(vectors[chosen])
    return found


def _noise(model: Any) -> Pixels:
    side = 8 * patch(model)
    return torch.randn(4, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))


def _no_text(text: str) -> list[int]:
    raise ValueError(f"the initial text {text!r} means nothing to a vision model; use init vocab (patches) or uniform")
