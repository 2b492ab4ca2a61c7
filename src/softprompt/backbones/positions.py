"""How many positions a model really has: the config's limit, less the rows that its tables reserve."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

Part = Literal["encoder", "decoder"]

_LIMITS: Mapping[Part, tuple[str, ...]] = {
    "encoder": ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len"),
    "decoder": ("max_position_embeddings", "max_decoder_position_embeddings"),
}
"""The config fields with the limit: LED has one for each part, MPT calls it `max_seq_len`."""
_TABLE_NAME = re.compile(r"wpe|(.*_)?pos(ition)?s?(_emb\w*)?|pos(ition)?s?_embed\w*")
"""Names of tables with one row per position, unlike relative ones (`rel_pos...`, `relative_attention_bias`)."""


def max_positions(model: Any, part: Part = "encoder") -> int | None:
    """The most positions that a sequence may have; None if the model sets no limit.

    The tables of RoBERTa, XLM-R and MPNet begin after the padding token's row, and those of OPT and BART have rows
    before the first position. Rotary frequencies that change with the longest row are usable only up to that length.

    Args:
        part: the part of an encoder-decoder, since the two may differ; for any other model, `encoder` is all of it.
    """
    limits = [
        value for name in _LIMITS[part] if isinstance(value := getattr(model.config, name, None), int) and value > 0
    ]
    limits += [rows for rows in _table_positions(_part(model, part)) if rows > 0]
    limits += _fixed_rope_lengths(model.config)
    return min(limits, default=None)


def _part(model: Any, part: Part) -> Any:
    if not getattr(model.config, "is_encoder_decoder", False):
        return model
    return model.get_encoder() if part == "encoder" else model.get_decoder()


def _table_positions(model: Any) -> Iterator[int]:
    """The number of positions in each learned or fixed position table."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)  # not every table is an nn.Embedding (I-BERT's is its own class)
        if "rel" in last or not _TABLE_NAME.fullmatch(last) or isinstance(module, nn.Linear) or weight is None:
            continue
        offset, padding = getattr(module, "offset", None), getattr(module, "padding_idx", None)
        if not isinstance(offset, int):
            offset = 0 if padding is None else padding + 1
        yield getattr(module, "num_embeddings", len(weight)) - offset


def _fixed_rope_lengths(config: Any) -> list[int]:
    """The lengths up to which rotary frequencies do not depend on the longest row of a batch."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, Mapping)]
    lengths = []
    for parameters in (rope, *by_layer_type):
        rope_type = parameters.get("rope_type", parameters.get("type"))
        if rope_type == "longrope" or "dynamic" in str(rope_type):
            length = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            lengths += [length] if isinstance(length, int) and length > 0 else []
    return lengths
