"""How prompts are combined with each architecture: one file each, one line in `PROMPTED_MODELS`.

Before a model is used, `config_checks.py` refuses kinds whose config already shows that they do not fit, and
`verify.py` and `verify_causal.py` run it with prompts, padding and rows of other lengths, and refuse it if a row's
outputs differ from those of the row alone. `input_checks.py` checks what each call is given. `peft_folder.py` reads the
prompts that PEFT saved.
"""

import torch
from torch import nn

from softprompt.backbones import Architecture, Backbone
from softprompt.models.base import PromptedModel
from softprompt.models.causal import Causal
from softprompt.models.encoder import Encoder
from softprompt.models.encoder_decoder import EncoderDecoder
from softprompt.models.inputs import PreparedPrompts
from softprompt.models.sampling import Sampling
from softprompt.models.vision import Vision
from softprompt.prompts import SoftPrompt
from softprompt.types import Pool, PromptAttention, PromptPosition

PROMPTED_MODELS: dict[Architecture, type[PromptedModel]] = {
    "causal": Causal,
    "encoder_decoder": EncoderDecoder,
    "encoder": Encoder,
    "vision": Vision,
}
"""The class for each architecture."""


def model_class(backbone: Backbone) -> type[PromptedModel]:
    """The class of `backbone`'s architecture, to ask what it can do before anything is attached.

    Raises:
        ValueError: prompts cannot be attached to the architecture.
    """
    if backbone.architecture not in PROMPTED_MODELS:
        raise ValueError(
            f"{backbone.source} is a model of the kind {backbone.architecture}; prompts can be attached to "
            f"{', '.join(PROMPTED_MODELS)}"
        )
    return PROMPTED_MODELS[backbone.architecture]


def attach(
    backbone: Backbone,
    prompt: SoftPrompt | None = None,
    *,
    head: nn.Module | None = None,
    tuned: nn.Module | None = None,
    prompt_position: PromptPosition = "prefix",
    prompt_attention: PromptAttention = "full",
) -> PromptedModel:
    """`backbone` with `prompt`, as an `nn.Module` for any training loop; without a prompt, the backbone alone.

    Args:
        head: classifies where the backbone has no vocabulary head; `fresh_head` makes one.
        tuned: weights of the backbone that a baseline trains; see `baselines.tune`.
        prompt_position: where the prompt is; only in front of a decoder's text is it computed once for all rows.
        prompt_attention: `self` hides the text from the prompt, so that it is computed once for all rows in an encoder
            too; another model, and a faster one.

    Raises:
        ValueError: prompts cannot be attached to the architecture, or the prompt, its position, its attention or the
            head does not fit the backbone.
    """
    return model_class(backbone)(backbone, prompt, head, tuned, prompt_position, prompt_attention)


def fresh_head(backbone: Backbone, classes: int, generator: torch.Generator, pool: Pool = "cls") -> nn.Module | None:
    """The head to train with a prompt: `hidden_size -> classes`, float32; None where the backbone answers in words.

    Args:
        classes: the task's classes; 0 where its answers are texts.
        generator: draws the initial weights, normal with a standard deviation of 0.02 as in BERT.
        pool: the states that the head of a vision model takes.

    Raises:
        ValueError: the backbone has no vocabulary head, and there are fewer than two classes.
    """
    return model_class(backbone).fresh_head(backbone, classes, generator, pool)


__all__ = ["PROMPTED_MODELS", "PreparedPrompts", "PromptedModel", "Sampling", "attach", "fresh_head", "model_class"]
