"""How many positions a frozen model really has: its config's word, less what its tables keep for padding."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

Part = Literal["encoder", "decoder"]

_LIMITS: Mapping[Part, tuple[str, ...]] = {
    "encoder": ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len"),
    "decoder": ("max_position_embeddings", "max_decoder_position_embeddings"),
}
"""What configs call it: LED has one for each part, MPT calls it `max_seq_len`."""
_TABLE = re.compile(r"wpe|(.*_)?pos(ition)?s?(_emb\w*)?|pos(ition)?s?_embed\w*")
"""Names of tables with a row a position; relative ones (`rel_pos...`, `relative_attention_bias`) have none of it."""


def usable(model: Any, part: Part = "encoder") -> int | None:
    """Positions that a sequence may have; none where the model sets no limit.

    RoBERTa's, XLM-R's and MPNet's tables begin behind the padding token's row, and OPT's and BART's have rows in front
    of the first position; rotary frequencies that change with the longest row are of use only up to where they do.

    Args:
        part: of an encoder-decoder, whose two parts may differ; of any other model `encoder` is all of it.
    """
    found = [
        value for name in _LIMITS[part] if isinstance(value := getattr(model.config, name, None), int) and value > 0
    ]
    found += [rows for rows in _tables(_part(model, part)) if rows > 0]
    found += _constant_rotary(model.config)
    return min(found, default=None)


def _part(model: Any, part: Part) -> Any:
    if not getattr(model.config, "is_encoder_decoder", False):
        return model
    return model.get_encoder() if part == "encoder" else model.get_decoder()


def _tables(model: Any) -> Iterator[int]:
    """Rows that each learned or fixed table has for positions."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)  # I-BERT's table is a module of its own
        if "rel" in last or not _TABLE.fullmatch(last) or isinstance(module, nn.Linear) or weight is None:
            continue
        offset, padding = getattr(module, "offset", None), getattr(module, "padding_idx", None)
        if not isinstance(offset, int):
            offset = 0 if padding is None else padding + 1
        yield getattr(module, "num_embeddings", len(weight)) - offset


def _constant_rotary(config: Any) -> list[int]:
    """Up to where rotary frequencies do not depend on how long the longest row of a batch is."""
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layers = [rotary, *(value for value in rotary.values() if isinstance(value, Mapping))]
    found = []
    for one in layers:
        kind = one.get("rope_type", one.get("type"))
        if kind == "longrope" or "dynamic" in str(kind):
            length = one.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            found += [length] if isinstance(length, int) and length > 0 else []
    return found
