"""The arguments of a call: rows, labels or candidates, and the prompts that the rows take."""

from abc import ABC
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softprompt.prompts import SoftPrompt


class Prepared(ABC):
    """What can be computed of some prompts before any input is known, as a value that many calls share."""

    prompts: Sequence[SoftPrompt]


PreparedT = TypeVar("PreparedT", bound=Prepared)
Ids = Int[Tensor, "batch seq"]
"""A batch's token ids."""
Pixels = Float[Tensor, "batch channel height width"]
"""A batch's images, as the backbone's processor makes them."""
Mask = Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None
"""1 at tokens, 0 at padding; none: all are tokens."""
Labels = Int[Tensor, "batch target"]
"""The tokens or the class that each row should answer; -100 where no label is."""
Candidates = Sequence[Sequence[int]]
"""The tokens of each possible answer."""
Prompts = Sequence[SoftPrompt] | Prepared | None
"""The prompts of a call; none: the model's own."""
Index = Int[Tensor, " batch"] | None
"""The prompt of each row, where a call has several."""
Layout = Literal["packed", "cached", "inline"]
"""How a decoder trains on prompts and rows. `packed`: prompts once and rows without padding, in one pass. `cached`: the
prompts, then the rows from their keys and values. `inline`: each row with its prompt in it, if that alone is exact."""


class Inputs(NamedTuple):
    """The rows of one call, and the prompts that they take."""

    rows: Tensor
    """Token ids, or pixels."""
    mask: Mask
    prompts: Prompts
    prompt_index: Index
