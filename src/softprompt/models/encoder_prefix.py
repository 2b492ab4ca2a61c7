"""Prompts that see themselves alone: each is run once for all rows, in training a batch, and at inference for good."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.kernels.varlen import States, VarlenLayout
from softprompt.models.base import Index, Prepared, PromptedModel, Prompts
from softprompt.models.padding import Rows, row_index
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class EncoderPrefixStates(Prepared):
    """Several isolated prompts' states in every layer, computed once."""

    prompts: Sequence[SoftPrompt]
    lengths: Sequence[int]
    layers: Sequence[States]
    """Keys and values, in the layers' order."""
    last: Float[Tensor, "prompt longest hidden"] | None
    """The last states; none where there is no prompt."""


def encoder_prefix_states(
    prompted: PromptedModel,
    prompts: Sequence[SoftPrompt],
    run: Callable[[Float[Tensor, "token dim"], VarlenLayout], Float[Tensor, "token hidden"]],
) -> EncoderPrefixStates:
    """The prompts' states, for any number of later calls.

    Args:
        run: the model's last states of packed tokens.
    """
    found = prompted.prompt_embeddings(prompts)
    if not found:
        return EncoderPrefixStates([], (), (), None)
    lengths, device = [len(matrix) for matrix in found], prompted.backbone.device
    layout = VarlenLayout(
        [], lengths, torch.zeros(len(found), dtype=torch.long, device=device), causal=False, record_kv=True
    )
    states = run(torch.cat(found).to(prompted.backbone.dtype), layout)
    return EncoderPrefixStates(list(prompts), lengths, layout.recorded_kv, layout.rows.pad(states))


def lay_out(
    prompted: PromptedModel, prompts: Prompts, index: Index, text: Rows, limit: int | None
) -> tuple[Float[Tensor, "token dim"], VarlenLayout]:
    """Prompts that are given as they are (in training) and then every row, packed; of prepared ones the rows alone.

    Args:
        limit: positions that the model has.

    Raises:
        ValueError: the prompts were prepared for an attachment of another kind.
    """
    if prompts is None:
        prompts = [] if prompted.prompt is None else [prompted.prompt]
    ready = prompts if isinstance(prompts, EncoderPrefixStates) else None
    if isinstance(prompts, Prepared) and ready is None:
        raise ValueError(f"{type(prompts).__name__} was prepared for joint prompts; prepare the prompts again")
    live = prompts.prompts if isinstance(prompts, Prepared) else prompts
    vectors = [] if ready else prompted.prompt_embeddings(live)
    lengths = list(ready.lengths) if ready else [len(matrix) for matrix in vectors]
    rows, counts = row_index(index, max(len(live), 1), text.ids), text.mask.sum(1)
    before = torch.tensor(lengths or [0], device=counts.device)[rows]
    prompted.refuse_long(int((counts + before).max()), limit)
    own = prompted.shifted(live, index, text.ids, text.positions())[text.mask.bool()]
    layers = ready.layers if ready and ready.prompts else None
    layout = VarlenLayout(lengths, counts.tolist(), rows, causal=False, cached_kv=layers)
    return torch.cat([*(matrix.to(own.dtype) for matrix in vectors), own]), layout
