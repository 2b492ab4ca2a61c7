"""Prompts that attend to themselves alone: each runs once for all rows, per batch in training, else once for good."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.kernels.varlen import States, VarlenLayout
from softprompt.models.base import PromptedModel
from softprompt.models.input_checks import checked_index
from softprompt.models.inputs import Index, PreparedPrompts, Prompts
from softprompt.models.padding import Rows
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class EncoderPrefixStates(PreparedPrompts):
    """Several such prompts' states in every layer."""

    prompts: Sequence[SoftPrompt]
    lengths: Sequence[int]
    layers: Sequence[States]
    """Keys and values, in the layers' order."""
    last: Float[Tensor, "prompt longest hidden"] | None
    """The last hidden states; None without a prompt."""

    @classmethod
    def compute(
        cls,
        prompted: PromptedModel,
        prompts: Sequence[SoftPrompt],
        run: Callable[[Float[Tensor, "token dim"], VarlenLayout], Float[Tensor, "token hidden"]],
    ) -> "EncoderPrefixStates":
        """The prompts' states, for any number of later calls.

        Args:
            run: gives the model's last hidden states of packed tokens.
        """
        vectors = prompted.prompt_embeddings(prompts)
        if not vectors:
            return cls([], (), (), None)
        lengths, device = [len(matrix) for matrix in vectors], prompted.backbone.device
        layout = VarlenLayout(
            [], lengths, torch.zeros(len(vectors), dtype=torch.long, device=device), causal=False, record_kv=True
        )
        states = run(torch.cat(vectors).to(prompted.backbone.dtype), layout)
        return cls(list(prompts), lengths, layout.recorded_kv, layout.rows.pad(states))


def pack_with_prompts(
    prompted: PromptedModel, prompts: Prompts, index: Index, text: Rows, limit: int | None
) -> tuple[Float[Tensor, "token dim"], VarlenLayout]:
    """Live prompts (in training) and then every row, packed; the rows alone where the prompts are prepared.

    Args:
        limit: the model's positions.

    Raises:
        ValueError: the prompts were prepared for a model of another kind.
    """
    cached = prompted.resolve(prompts, EncoderPrefixStates) if isinstance(prompts, PreparedPrompts) else None
    live = prompted.prompts_of(prompts)
    vectors = [] if cached else prompted.prompt_embeddings(live)
    lengths = list(cached.lengths) if cached else [len(matrix) for matrix in vectors]
    index, counts = checked_index(index, max(len(live), 1), text.ids), text.mask.sum(1)
    before = torch.tensor(lengths or [0], device=counts.device)[index]
    prompted.check_length(int((counts + before).max()), limit)
    packed = prompted.token_embeddings(live, index, text.ids, text.positions())[text.mask.bool()]
    layers = cached.layers if cached and cached.prompts else None
    layout = VarlenLayout(lengths, counts.tolist(), index, causal=False, cached_kv=layers)
    return torch.cat([*(matrix.to(packed.dtype) for matrix in vectors), packed]), layout
