"""Checks of what a caller passes: the mask, the prompts' index, token ids and candidates.

Checks that depend on the architecture (a row's length, an answer's) are methods of `PromptedModel`. Whether a model can
be used at all is checked in `config_checks.py` and `verify.py`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models.inputs import Candidates
from softprompt.types import PromptAttention, PromptPosition

if TYPE_CHECKING:
    from softprompt.models.base import PromptedModel


def checked_mask(
    ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"]:
    """The attention mask as integers; all ones where there is none.

    Raises:
        ValueError: no rows, another shape than the ids', values other than 0 and 1, or a row without a token.
    """
    if not ids.numel():
        raise ValueError(f"input_ids is {tuple(ids.shape)}; give at least one row of at least one token")
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; they must be equal")
    mask = mask.long()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask has values other than 0 and 1; give 1 for tokens and 0 for padding")
    if empty := (mask.sum(1) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"rows {empty} have no token; leave empty rows out")
    return mask


def checked_index(
    index: Int[Tensor, " batch"] | None, count: int, ids: Int[Tensor, "batch seq"]
) -> Int[Tensor, " batch"]:
    """The prompt of each row, from 0 to `count - 1`: `index` checked, or zeros where there is none.

    Raises:
        ValueError: several prompts and no index, or an index that is out of range or of another length.
    """
    batch = ids.shape[0]
    if index is None:
        if count > 1:
            raise ValueError(f"{count} prompts are given and no index; say which prompt each of the {batch} rows takes")
        return torch.zeros(batch, dtype=torch.long, device=ids.device)
    if index.shape != (batch,) or int(index.min()) < 0 or int(index.max()) >= max(count, 1):
        raise ValueError(f"index is {index.tolist()}; it needs {batch} numbers from 0 to {count - 1}, one per row")
    return index.to(ids.device)


def check_token_ids(backbone: Backbone, ids: Sequence[int], where: str, name: str = "") -> None:
    """Refuse tokens that the model has no embedding for: added to the tokenizer, and the model was not resized.

    Args:
        where: what has the tokens, for the message.
        name: the backbone's name in the message; its source by default.

    Raises:
        ValueError: naming the first such token by its text.
    """
    size = backbone.vocab_size if ids else 0  # an image has no tokens
    for token in ids:
        if not 0 <= token < size:
            text = backbone.tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
            raise ValueError(
                f"{where} has the token {text!r} ({token}), for which {name or backbone.source} has no embedding (its "
                f"ids are 0 to {size - 1}); take the token out, or resize the model and train that embedding first"
            )


def check_not_empty(candidates: Candidates) -> None:
    """Refuse to score no candidates, or one without tokens."""
    if not candidates or not all(candidates):
        raise ValueError(f"candidates are {list(candidates)}; give at least one, each with at least one token")


def check_class_count(classes: int, candidates: Candidates) -> None:
    """Refuse candidates that are not one per class of a head."""
    if classes != len(candidates):
        raise ValueError(
            f"the head has {classes} classes and {len(candidates)} candidates are given; use the task that it was "
            "trained for"
        )


def check_attachment(
    model: "PromptedModel", backbone: Backbone, has_head: bool, position: PromptPosition, attention: PromptAttention
) -> None:
    """Refuse a head, or a position or attention of the prompt, that the backbone or its architecture does not support.

    Raises:
        ValueError: naming the argument and what to use.
    """
    name = f"{backbone.source} ({backbone.architecture})"
    if position not in model.prompt_positions:
        raise ValueError(
            f"prompt_position is {position!r}, which {name} does not support; use "
            f"{' or '.join(map(repr, model.prompt_positions))}"
        )
    if attention != "full" and not (model.supports_self_attention and position == "prefix"):
        raise ValueError(
            f"prompt_attention is {attention!r}, which {name} does not support with prompt_position "
            f"{position!r}; use 'full', or an encoder or encoder-decoder with prompt_position 'prefix'"
        )
    if has_head and model.generates:
        raise ValueError(f"{backbone.source} answers in words and takes no head; leave it out")
    if not has_head and model.needs_head(backbone):
        raise ValueError(
            f"{backbone.source} has no vocabulary head to answer with; give a head to train, as in "
            "attach(backbone, prompt, head=fresh_head(backbone, classes, generator))"
        )
