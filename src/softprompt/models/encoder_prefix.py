"""Prompts that see themselves alone: each is run once for all rows, in training a batch, and at inference for good."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.kernels.varlen import Packing, States
from softprompt.models.base import Attachment, Index, Prepared, Prompts
from softprompt.models.padding import Rows, row_index
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class Kept(Prepared):
    """Several isolated prompts' states in every layer, computed once."""

    prompts: Sequence[SoftPrompt]
    lengths: Sequence[int]
    layers: Sequence[States]
    """Keys and values, in the layers' order."""
    last: Float[Tensor, "prompt longest hidden"] | None
    """The last states; none where there is no prompt."""


def kept(
    attachment: Attachment,
    prompts: Sequence[SoftPrompt],
    run: Callable[[Float[Tensor, "token dim"], Packing], Float[Tensor, "token hidden"]],
) -> Kept:
    """The prompts' states, for any number of later calls.

    Args:
        run: the model's last states of packed tokens.
    """
    found = attachment.matrices(prompts)
    if not found:
        return Kept([], (), (), None)
    lengths, device = [len(matrix) for matrix in found], attachment.backbone.device
    packing = Packing([], lengths, torch.zeros(len(found), dtype=torch.long, device=device), causal=False, keeps=True)
    states = run(torch.cat(found).to(attachment.backbone.dtype), packing)
    return Kept(list(prompts), lengths, packing.computed, packing.rows.padded(states))


def laid_out(
    attachment: Attachment, prompts: Prompts, index: Index, text: Rows, limit: int | None
) -> tuple[Float[Tensor, "token dim"], Packing]:
    """Prompts that are given as they are (in training) and then every row, packed; of prepared ones the rows alone.

    Args:
        limit: positions that the model has.

    Raises:
        ValueError: the prompts were prepared for an attachment of another kind.
    """
    if prompts is None:
        prompts = [] if attachment.prompt is None else [attachment.prompt]
    ready = prompts if isinstance(prompts, Kept) else None
    if isinstance(prompts, Prepared) and ready is None:
        raise ValueError(f"{type(prompts).__name__} was prepared for joint prompts; prepare the prompts again")
    live = prompts.prompts if isinstance(prompts, Prepared) else prompts
    vectors = [] if ready else attachment.matrices(live)
    lengths = list(ready.lengths) if ready else [len(matrix) for matrix in vectors]
    rows, counts = row_index(index, max(len(live), 1), text.ids), text.mask.sum(1)
    before = torch.tensor(lengths or [0], device=counts.device)[rows]
    attachment.refuse_long(int((counts + before).max()), limit)
    own = attachment.shifted(live, index, text.ids, text.positions())[text.mask.bool()]
    layers = ready.layers if ready and ready.prompts else None
    packing = Packing(lengths, counts.tolist(), rows, causal=False, kept=layers)
    return torch.cat([*(matrix.to(own.dtype) for matrix in vectors), own]), packing
