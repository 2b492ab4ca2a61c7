"""How a decoder runs prompts and rows together, and which of these ways is exact for a model."""

from typing import TYPE_CHECKING, Literal

import torch

from softprompt.backbones.kernels import attention
from softprompt.models.verify import OutputMismatch, cached_check
from softprompt.models.verify_causal import SingleRows, check_mixed_batch, packed_rows_are_exact

if TYPE_CHECKING:
    from softprompt.models.causal import Causal

BatchLayout = Literal["packed", "cached", "inline"]
"""`packed`: prompts once and rows without padding, in one pass (in training, and in scoring through fused layers; else
like `cached`). `cached`: rows continue from the prompts' keys and values. `inline`: each row contains its prompt."""


def choose_layout(prompted: "Causal", *, fused: bool) -> BatchLayout:
    """The fastest layout in which a row's result does not depend on the batch's other rows.

    A model that takes explicit positions shares the prompts' keys and values among all rows. One that counts columns
    (MPT's ALiBi) is exact where prompt and text are adjacent, so there the prompt runs in every row. Results are
    remembered for each model and position, and nothing runs where only the embedding table is in memory.

    Args:
        prompted: runs the checks, so its own `layout` changes meanwhile.
        fused: whether its layers run through our own code.

    Raises:
        OutputMismatch: no layout is exact.
    """
    backbone = prompted.backbone
    takes_positions = "position_ids" in backbone.forward_arguments
    # In bfloat16 an extra column may hide in rounding, so a model without explicit positions cannot pass.
    provable = takes_positions or backbone.dtype is torch.float32
    if backbone.embeddings_only:
        return "cached" if prompted.prompt_position == "prefix" else "inline"
    single_rows = SingleRows(backbone, prompted.window, prompted.prompt_position)
    is_prefix = prompted.prompt_position == "prefix"
    if not (is_prefix and provable and _cached_is_exact(prompted, single_rows, takes_positions)):
        _check_inline(prompted, single_rows)
        return "inline"
    if not (takes_positions and attention.supports_varlen(backbone.model)):
        return "cached"
    prompted.layout = "packed"
    is_exact = cached_check(backbone.model, f"packed {fused}", lambda: packed_rows_are_exact(prompted, single_rows))
    return "packed" if is_exact else "cached"


def _cached_is_exact(prompted: "Causal", single_rows: SingleRows, takes_positions: bool) -> bool:
    """Whether rows can continue from the prompts' keys and values; raises for a model that takes positions."""

    def check() -> bool:
        try:
            check_mixed_batch(prompted, single_rows, "a shared prefix and neighbors of other lengths")
        except OutputMismatch:
            if takes_positions:
                raise
            return False
        return True

    prompted.layout = "cached"
    return cached_check(prompted.backbone.model, "shared", check)


def _check_inline(prompted: "Causal", single_rows: SingleRows) -> None:
    """Check that each row can have its prompt in it."""
    position = prompted.prompt_position

    def check() -> bool:
        check_mixed_batch(prompted, single_rows, f"prompts in rows of other lengths, {position!r},")
        return True

    prompted.layout = "inline"
    cached_check(prompted.backbone.model, f"inline {position}", check)
