"""The arguments of a call: rows, labels or candidates, and the prompts that the rows take."""

from abc import ABC
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softprompt.prompts import SoftPrompt


class PreparedPrompts(ABC):
    """What `PromptedModel.prepare` computes of some prompts before any input is known; many calls can share it.

    What that is depends on how the model runs prompts, so each way has a class of its own, and a model refuses the
    others: `KVPrefixBatch` (a decoder: keys and values), `PromptEmbeddings` (the vectors alone, where prompts run in
    every row), `EncoderPrefixStates` (an encoder with `prompt_attention="self"`: keys, values and last states) and
    `LayerPromptEmbeddings` (a vision model: vectors by layer).
    """

    prompts: Sequence[SoftPrompt]


PreparedT = TypeVar("PreparedT", bound=PreparedPrompts)
Ids = Int[Tensor, "batch seq"]
"""A batch's token ids."""
Pixels = Float[Tensor, "batch channel height width"]
"""A batch's images, as the backbone's processor makes them."""
Mask = Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None
"""1 at tokens, 0 at padding; None: all are tokens."""
Labels = Int[Tensor, "batch target"]
"""The tokens or the class that each row should answer; -100 where no label is."""
Candidates = Sequence[Sequence[int]]
"""The tokens of each possible answer."""
Prompts = Sequence[SoftPrompt] | PreparedPrompts | None
"""The prompts of a call; None: the model's own."""
Index = Int[Tensor, " batch"] | None
"""The prompt of each row, where a call has several."""


class Inputs(NamedTuple):
    """The rows of one call, and the prompts that they take."""

    rows: Tensor
    """Token ids, or pixels."""
    mask: Mask
    prompts: Prompts
    prompt_index: Index
