"""How a prompt meets an architecture: one file each, one line in `PROMPTED_MODELS`."""

from torch import nn

from softprompt.backbones import Architecture, Backbone
from softprompt.models.base import Prepared, PromptedModel
from softprompt.models.causal import Causal
from softprompt.models.encoder import Encoder, fresh_head
from softprompt.models.encoder_decoder import EncoderDecoder
from softprompt.models.sampling import Sampling
from softprompt.models.vision import Vision
from softprompt.prompts import SoftPrompt
from softprompt.types import PromptAttention, PromptPosition

PROMPTED_MODELS: dict[Architecture, type[PromptedModel]] = {
    "causal": Causal,
    "encoder_decoder": EncoderDecoder,
    "encoder": Encoder,
    "vision": Vision,
}
"""Which attachment fits which architecture."""


def attach(
    backbone: Backbone,
    prompt: SoftPrompt | None = None,
    *,
    head: nn.Module | None = None,
    tuned: nn.Module | None = None,
    prompt_position: PromptPosition = "prefix",
    prompt_attention: PromptAttention = "full",
) -> PromptedModel:
    """`prompt` in front of `backbone`, as an `nn.Module` for any training loop; none: the backbone alone.

    Args:
        head: what an encoder without a vocabulary head answers through; `fresh_head` makes one.
        tuned: weights of the backbone's own that a baseline trains, see `baseline.tune`.
        prompt_position: where the prompt stands; only in front of a decoder's text is it computed once for all rows.
        prompt_attention: an isolated prompt is computed once for all rows in an encoder too; another model, and a
            faster one.

    Raises:
        ValueError: there is no attachment for the architecture, or the prompt, its place or the head does not fit the
            backbone.
    """
    if backbone.architecture not in PROMPTED_MODELS:
        raise ValueError(
            f"{backbone.source} is a model of the kind {backbone.architecture}; prompts can be attached to "
            f"{', '.join(PROMPTED_MODELS)}"
        )
    return PROMPTED_MODELS[backbone.architecture](backbone, prompt, head, tuned, prompt_position, prompt_attention)


__all__ = ["PROMPTED_MODELS", "Prepared", "PromptedModel", "Sampling", "attach", "fresh_head"]
