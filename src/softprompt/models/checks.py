"""Checks of tokens and candidates before a model runs."""

from collections.abc import Sequence

from softprompt.backbones import Backbone
from softprompt.models.inputs import Candidates


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
