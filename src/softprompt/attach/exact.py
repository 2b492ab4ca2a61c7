"""Which models an attachment is exact for; the others are refused by name."""

from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.attach.base import Attachment
from softprompt.backbone import Backbone
from softprompt.prompts import Folded

exact: WeakSet[Any] = WeakSet()
"""Models whose attachment has been compared with plain concatenation in this process."""
exact_isolated: WeakSet[Any] = WeakSet()
"""Encoders whose isolated prompts have been compared with the model's own forward under a mask."""
_apart: WeakSet[Any] = WeakSet()
"""Those among them that give other outputs for packed tokens, whose prompts and rows must run one after the other."""


def forget(model: Any) -> None:
    """Compare `model` anew where it is attached next: its layers will run in another way."""
    for known in (exact, exact_isolated, _apart):
        known.discard(model)


def sliding_window(backbone: Backbone) -> int | None:
    """The narrowest attention window of any layer, where there is one."""
    config = backbone.model.config
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if types is not None and all(kind == "full_attention" for kind in types):
        return None
    if types is None and getattr(config, "use_sliding_window", True) is False:
        return None
    return int(window) if window else None


def refuse_unusual(backbone: Backbone, accepted: frozenset[str]) -> None:
    """Refuse state other than attention's keys and values, and a forward that lacks what the prefix needs."""
    config = backbone.model.config
    strange = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    missing = sorted({"past_key_values", "inputs_embeds", "attention_mask", "logits_to_keep"} - accepted)
    if strange or missing:
        reason = f"has {', '.join(strange)} layers" if strange else f"takes no {', '.join(missing)}"
        raise ValueError(
            f"{backbone.source} ({config.model_type}) {reason}; a shared prefix is exact only for attention over "
            "cached keys and values, so this model is refused: choose a decoder with full attention"
        )


@torch.no_grad()
def check_exact(attachment: Attachment) -> bool:
    """Compare the prefix with plain concatenation, once a model, so that an unusual one is refused and not wrong.

    Returns:
        Whether packed tokens give the same too.
    """
    backbone = attachment.backbone
    if backbone.model not in exact:
        table = backbone.host().embedding
        # From all over the vocabulary: the first ids are special ones, on which bfloat16 itself is off by half.
        places = torch.linspace(0.1 * len(table), 0.9 * len(table), 9).long()
        rows, ids = table[places[:5]], places[None, 5:].to(backbone.device)
        text = backbone.model.get_input_embeddings()(ids)
        embeds = torch.cat([rows[None].to(backbone.device, backbone.dtype), text], 1)
        whole = backbone.model(inputs_embeds=embeds).logits.float()
        prompts = [Folded(rows)]
        apart = attachment(ids, prompts=attachment.prepare(prompts)).logits.float()
        refuse_different(backbone, whole[:, -4:], apart, "a shared prefix")
        together = attachment(ids, labels=ids, prompts=prompts).logits.float()
        difference = float((together - whole[:, -5:-1]).norm() / whole[:, -5:-1].norm())
        if not difference <= (1e-3 if backbone.dtype is torch.float32 else 0.1):
            _apart.add(backbone.model)
    return backbone.model not in _apart


def refuse_different(
    backbone: Backbone, whole: Float[Tensor, "*shape"], ours: Float[Tensor, "*shape"], how: str, what: str = "logits"
) -> None:
    """Refuse a model whose outputs differ from those of the prompt in the row; remember one whose do not.

    Args:
        how: what ours were made with, for the message.
        what: the outputs.
    """
    gap, size = float((whole - ours).abs().max()), float(whole.abs().max())
    tolerance = (1e-3 if backbone.dtype is torch.float32 else 6e-2) * max(size, 1.0)
    if not gap <= tolerance:
        raise ValueError(
            f"{backbone.source} ({backbone.model.config.model_type}) gives other {what} with {how} than with the "
            f"prompt in the row (largest difference {gap:.2g}); its attention is unusual, so it is refused: choose "
            "another backbone"
        )
    exact.add(backbone.model)
