"""The parts of a vision transformer (ViT, DeiT, DINOv2), and what a prompt method may know about it."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from softprompt.backbones import projections
from softprompt.backbones.kernels import attention
from softprompt.files import error_text
from softprompt.prompts import Host

Pixels = Float[Tensor, "image channel height width"]
States = Float[Tensor, "image token dim"]

_MAX_VECTORS = 4096
"""The most input vectors that a host has per layer."""


def check_supported(model: Any, source: str) -> None:
    """Check that a model is a plain vision transformer, by its parts and by running the first of them.

    Raises:
        ValueError: it lacks a part that a prompt needs, its parts do not run one after another, or it takes images
            without three color channels.
    """
    embeddings = getattr(model, "embeddings", None)
    parts = (getattr(embeddings, "patch_embeddings", None), getattr(model, "layernorm", None), _layers(model))
    learned = (getattr(embeddings, "cls_token", None), getattr(embeddings, "position_embeddings", None))
    if any(part is None for part in (*learned, *parts)):
        raise _unsupported(model, source)
    if (channels := model.config.num_channels) != 3:
        raise ValueError(
            f"{source} takes images of {channels} channels, but images are read in three; choose another model"
        )
    pixels = _noise(model)[:1].to(next(model.parameters()).device)
    try:
        with torch.no_grad():
            states = embed(model, pixels)
            with_prompt = torch.cat([states, states[:, -1:]], 1)
            output = run_layer(layers(model)[0], with_prompt)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # MAE drops patches at random, layers with relative positions need the image's size, ...
        raise _unsupported(model, source, f" ({error_text(error)[:200]})") from error
    patches = (pixels.shape[2] // patch_size(model)) * (pixels.shape[3] // patch_size(model))
    if states.shape[1] != num_prefix_tokens(model) + patches or output.shape != with_prompt.shape:
        raise _unsupported(model, source)


def _unsupported(model: Any, source: str, reason: str = "") -> ValueError:
    return ValueError(
        f"{source} ({model.config.model_type}) is not a plain vision transformer with a [CLS] token, learned positions "
        f"and one stack of layers that run one after another{reason}; choose a ViT, DeiT or DINOv2"
    )


def loading_arguments(config: Any) -> dict[str, bool]:
    """The arguments of `from_pretrained` that leave out the pooler.

    If a checkpoint lacks one, it would be initialized at random and differ at every load.
    """
    model_class = transformers.MODEL_MAPPING.get(type(config), object)
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}


def layers(model: Any) -> Sequence[nn.Module]:
    """The model's layers, from the first to the last."""
    stack = _layers(model)
    assert stack is not None  # see check_supported
    return list(stack)


def _layers(model: Any) -> Any:
    return getattr(model, "layers", getattr(getattr(model, "encoder", None), "layer", None))


def num_prefix_tokens(model: Any) -> int:
    """The number of tokens before the patches: [CLS], DeiT's distillation token, DINOv2's registers."""
    distilled = hasattr(model.embeddings, "distillation_token")
    return 1 + int(distilled) + int(getattr(model.config, "num_register_tokens", 0))


def patch_size(model: Any) -> int:
    """The side of a patch in pixels."""
    size = model.config.patch_size
    return int(size if isinstance(size, int) else size[0])


def embed(model: Any, pixels: Pixels) -> States:
    """The first layer's input: prefix tokens and patches, with positions interpolated to the image's size.

    Raises:
        ValueError: the image's sides are not multiples of the patch size.
    """
    side = patch_size(model)
    if pixels.shape[2] % side or pixels.shape[3] % side:
        near = max(round(pixels.shape[3] / side), 1) * side
        raise ValueError(
            f"an image of {pixels.shape[3]} x {pixels.shape[2]} pixels is not a whole number of patches of {side}; "
            f"give an image size of {near}"
        )
    embeddings = model.embeddings
    states: Tensor = embeddings(pixels.to(next(embeddings.parameters()).dtype), **_interpolation(embeddings))
    return states


def _interpolation(module: nn.Module) -> dict[str, bool]:
    """The argument that interpolates positions, for a module that takes it."""
    argument = "interpolate_pos_encoding"
    return {argument: True} if argument in inspect.signature(module.forward).parameters else {}


def run(model: Any, pixels: Pixels) -> States:
    """The last hidden states, after the final norm, by the model's own forward."""
    pixel_values = pixels.to(next(model.parameters()).dtype)
    states: Tensor = model(pixel_values=pixel_values, **_interpolation(model)).last_hidden_state
    return states


def run_layer(layer: nn.Module, states: States, mask: Tensor | None = None) -> States:
    """The hidden states after one layer."""
    output = layer(states, mask)
    return output if isinstance(output, Tensor) else output[0]


def attention_mask(model: Any, visible: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
    """The mask as the model's attention takes it: `visible` itself, or 0 and the lowest number, added to the scores.

    torch's fused kernel and ours take the first, the model's own code (`eager`) the second.
    """
    if model.config._attn_implementation == "sdpa" or attention.is_installed(model):
        return visible
    lowest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, lowest)


def hosts(
    model: Any,
    images: Pixels | None,
    num_layers: int,
    label_words: tuple[str, ...],
    start: Float[Tensor, "prompt dim"] | None,
) -> list[Host]:
    """What a prompt method may know about the first `num_layers` layers: one host each, with patch states as vectors.

    Args:
        images: the images whose patch states are sampled; None for noise, which gives a rough scale only.
        start: a trained prompt to initialize from, the layers' prompts concatenated.
    """
    stack = layers(model)[:num_layers]
    starts: Sequence[Tensor | None] = [None] * num_layers if start is None else start.chunk(num_layers)
    samples = _samples(model, stack, _noise(model) if images is None else images)
    return [
        Host(
            embedding=sample,
            encode=_no_text,
            label_words=label_words,
            start=layer_start,
            query_key=projections.lazy_product(model, layer),
        )
        for layer, sample, layer_start in zip(stack, samples, starts, strict=True)
    ]


@torch.no_grad()
def _samples(model: Any, stack: Sequence[nn.Module], images: Pixels) -> list[Float[Tensor, "vector dim"]]:
    """Patch states before each layer of the model without a prompt, sampled; float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    batches = [embed(model, pixels.to(device)) for pixels in torch.split(images, 16)]
    samples = []
    for previous_layer in (None, *stack[:-1]):
        if previous_layer is not None:
            batches = [run_layer(previous_layer, states) for states in batches]
        first_patch = num_prefix_tokens(model)
        vectors = torch.cat([states[:, first_patch:].flatten(0, 1).float().cpu() for states in batches])
        sampled = torch.randperm(len(vectors), generator=generator)[:_MAX_VECTORS]
        samples.append(vectors[sampled])
    return samples


def _noise(model: Any) -> Pixels:
    side = 8 * patch_size(model)
    return torch.randn(4, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))


def _no_text(text: str) -> list[int]:
    raise ValueError(
        f"the initial text is {text!r}, but a vision model takes no text; use init vocab (patches) or uniform"
    )
