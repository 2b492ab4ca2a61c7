"""Which models an attachment is exact for; the others are refused by name.

Every check runs rows of different lengths and prompts in one batch and compares each with the same row alone through
the model's own forward: a model that counts positions by column, or that looks at padding, differs there and nowhere
else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones import Backbone
from softprompt.models.padding import pad_batch
from softprompt.prompts import Folded

_NEIGHBOUR = 32
"""Tokens of the longest row of a check: beside it a short one has so much padding that no rounding hides its effect."""
_known: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()
"""What was found of each model in this process, by the check's name."""


def forget(model: Any) -> None:
    """Compare `model` anew where it is attached next: its layers will run in another way."""
    _known.pop(model, None)


def remembered(model: Any, check: str, find: Callable[[], bool]) -> bool:
    """What `find` says of `model`, asked once a model and name; what it raises is raised each time anew."""
    found = _known.setdefault(model, {})
    if check not in found:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            found[check] = find()
    return found[check]


def sliding_window(backbone: Backbone) -> int | None:
    """The narrowest attention window of any layer, where there is one."""
    config = backbone.model.config
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's word
        return int(config.window_size)
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


def refuse_length_bound(backbone: Backbone) -> None:
    """Refuse a model whose results for a row depend, at some length, on how long the batch is.

    A check of short rows cannot see that: block-sparse attention (BigBird) begins at some hundred tokens, Nystrom's
    landmarks (Nystromformer) are means over a batch's whole length, hashed chunks (Reformer) are drawn by chance, and
    experts of a limited capacity (Switch) drop tokens when a batch is large.

    Raises:
        ValueError: it is such a model.
    """
    config = backbone.model.config
    why = ""
    if getattr(config, "attention_type", None) == "block_sparse":
        why = "has block-sparse attention (attention_type in its config), which changes with the longest row of a batch"
    elif hasattr(config, "num_landmarks") and hasattr(config, "segment_means_seq_len"):
        why = "attends through landmarks, which are means over a batch's whole length, padding with it"
    elif hasattr(config, "lsh_attn_chunk_length"):
        why = "attends within chunks of hashed tokens, drawn by chance"
    elif getattr(config, "expert_capacity", None) is not None and getattr(config, "num_experts", 1) > 1:
        why = "has experts of a limited capacity, which leave tokens out depending on the batch's other rows"
    if why:
        raise ValueError(
            f"{backbone.source} ({config.model_type}) {why}; a row's result would depend on its neighbours, so this "
            "model is refused: choose another backbone"
        )


@final
class Sample(NamedTuple):
    """Rows of different lengths with prompts of different lengths, and how each goes on."""

    prompts: Sequence[Folded]
    prompt_index: Int[Tensor, " row"]
    texts: Sequence[Sequence[int]]
    answer: Sequence[int]
    """What follows each text: three tokens."""

    def batch(self, device: torch.device) -> tuple[Int[Tensor, "row longest"], Int[Tensor, "row longest"]]:
        """The texts side by side, and their mask."""
        return pad_batch(self.texts, device)

    def prompt(self, row: int) -> Float[Tensor, "prompt dim"]:
        """That of a row."""
        return self.prompts[int(self.prompt_index[row])].prompt()


def sample(backbone: Backbone, window: int | None = None) -> Sample:
    """Three rows: short, shorter with a short prompt, and long; fewer tokens where the model has few positions.

    Args:
        window: no row with its prompt and answer may be longer.
    """
    table = backbone.host().embedding
    most = min(limit for limit in (backbone.max_positions, backbone.max_answer_positions, window, 1024) if limit)
    longest = max(1, min(5, (most - 5) // 3))
    lengths = [min(4, longest), 2, max(3, min(_NEIGHBOUR, most - longest - 5))]
    # From all over the vocabulary: the first ids are special ones, on which bfloat16 itself is off by half.
    places = torch.linspace(0.1 * len(table), 0.9 * len(table), longest + 2 + sum(lengths) + 3).long().tolist()
    places = places[::2] + places[1::2]  # else a row's tokens would be neighbours in the vocabulary
    prompts = [Folded(table[places[:longest]].float()), Folded(table[places[longest : longest + 2][:longest]].float())]
    rest, texts = places[longest + 2 :], list[list[int]]()
    for length in lengths:
        texts.append(rest[:length])
        rest = rest[length:]
    return Sample(prompts, torch.tensor([0, 1, 0], device=backbone.device), texts, rest)


@contextmanager
def refusing(backbone: Backbone, how: str) -> Iterator[None]:
    """What fails within is the model's own failure with `how`, and said by its name.

    Raises:
        ValueError: it failed.
    """
    try:
        yield
    except Different:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward is its author's program, and raises what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise Different(
            f"{backbone.source} ({backbone.model.config.model_type}) fails with {how} ({reason}); its attention is "
            "unusual, so it is refused: choose another backbone"
        ) from error


class Different(ValueError):
    """A model gives other outputs than it should."""


def is_near(backbone: Backbone, insert_prompts: Float[Tensor, "*shape"], ours: Float[Tensor, "*shape"]) -> bool:
    """Whether two outputs differ by no more than roundings do."""
    wide, gap = insert_prompts.float(), insert_prompts.float() - ours.float()
    if backbone.dtype is torch.float32:
        return float(gap.abs().max()) <= 1e-3 * float(wide.abs().max())
    # bfloat16 is off by much at single places (a first token, a rare one), and by little on the whole; what all outputs
    # of a token have in common says nothing. SmolLM2-135M: up to 0.06, and above 0.2 where a row's places are wrong.
    apart, size = ((part - part.mean(-1, keepdim=True)).norm() for part in (gap, wide))
    return float(apart) <= 0.12 * float(size)


def refuse_different(
    backbone: Backbone,
    insert_prompts: Float[Tensor, "*shape"],
    ours: Float[Tensor, "*shape"],
    how: str,
    what: str = "logits",
) -> None:
    """Refuse a model whose outputs differ from those of the prompt in the row.

    Args:
        how: what ours were made with, for the message.
        what: the outputs.

    Raises:
        ValueError: they differ by more than roundings.
    """
    if not is_near(backbone, insert_prompts, ours):
        gap = float((insert_prompts.float() - ours.float()).abs().max())
        raise Different(
            f"{backbone.source} ({backbone.model.config.model_type}) gives other {what} with {how} than with the "
            f"prompt in the row (largest difference {gap:.2g}); its attention is unusual, so it is refused: choose "
            "another backbone"
        )
