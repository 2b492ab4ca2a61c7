"""DePT: a shorter prompt, and a low-rank offset that is added to the input's embeddings by position."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.prompts.base import (
    Beyond,
    Folded,
    Host,
    PromptConfig,
    SoftPrompt,
    add_by_position,
    at_least,
    max_input_length,
)
from softprompt.prompts.initialization import Init, check_init, check_scale, initial_matrix


@final
class OffsetPrompt(SoftPrompt):
    """`[scale * matrix; E + scale * gain * (left @ right)[position]]`."""

    scale: Tensor
    gain: Tensor

    def __init__(
        self,
        matrix: Float[Tensor, "prompt dim"],
        left: Float[Tensor, "position rank"],
        right: Float[Tensor, "rank dim"],
        scale: float,
        gain: float,
        beyond: Beyond,
    ) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("gain", torch.tensor(gain, dtype=torch.float32))
        self.beyond = beyond
        self.max_input_length = max_input_length(left, beyond)

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The short prompt in the host's units."""
        return self.scale * self.matrix

    def offset(self) -> Float[Tensor, "position dim"]:
        """The offset of each input position, in the host's units."""
        return self.scale * self.gain * (self.left @ self.right)

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings plus their positions' offsets.

        Raises:
            ValueError: a position past the table, with `beyond=refuse`.
        """
        return add_by_position(embeds, positions, self.offset(), self.beyond)

    def fold(self) -> Folded:
        """The prompt and the table of offsets."""
        return Folded(self.prompt().detach().clone(), position_table=self.offset().detach().clone(), beyond=self.beyond)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompt, and the factors of the offset."""
        return {"prompt": [self.matrix], "offset": [self.left, self.right]}


@final
@dataclass(frozen=True, kw_only=True)
class DePT(PromptConfig):
    """`[P_s; E + s A B]`, `length * dim + (positions + dim) * rank` parameters.

    The shorter prompt saves time and memory; the offset costs one product per step and one addition after folding.
    PEFT's prompt-tuning format cannot express it.
    Reference: Shi and Lipani 2024, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning"; `left` is
    their A and `right` their B, and `s = alpha / sqrt(rank)` is in their code only.
    Differs: a row of the offset belongs to a token's position, not to its column in a batch padded to `positions`,
    so padding changes nothing; prompt and offset are kept at unit size and a constant carries both to the host's
    embedding RMS (`scale=1` is the published form); the paper's two learning rates become `lr` and a ratio.

    >>> DePT(length=60, rank=30, positions=256).count(768)
    76800
    """

    folds: ClassVar[str] = "prompt + position table"

    length: int = 60
    """Virtual tokens in front of the input."""
    rank: int = 30
    """Width of the offset's two factors."""
    positions: int = 256
    """Input tokens that have an offset."""
    beyond: Beyond = "refuse"
    """What happens to a token past `positions`: an error (a task's rows are cut to fit), or no offset."""
    alpha: float = 8.0
    """The offset is multiplied by `alpha / sqrt(rank)`."""
    offset_rate: float = 0.01
    """Learning rate of the offset, relative to the prompt's (published runs: 0.0003 to 0.017)."""
    init: Init = "vocab"
    """Source of the prompt's initial values."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """What 1.0 in the trained tensors means in embedding space; None: the host's embedding RMS."""

    def check(self) -> None:
        """Refuse sizes, scales and initial values that cannot work."""
        super().check()
        at_least(1, rank=self.rank, positions=self.positions)
        if self.beyond not in ("refuse", "none"):
            raise ValueError(f"beyond is {self.beyond!r}; it must be 'refuse' or 'none'")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha is {self.alpha}; it must be a positive number")
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "DePT":
        """Length 60, rank 30, 256 positions and the code's first text; learning rates 0.3 and 0.0005 (of three)."""
        text = "Classify this text is postive or not:"  # sic: the correct spelling has other tokens
        return cls(length=60, rank=30, positions=256, offset_rate=5e-4 / 0.3, init="text", init_text=text, scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> OffsetPrompt:
        """Initial vectors, A ~ U(+-1/sqrt(rank)) and B = 0: the offset starts at zero."""
        scale = host.rms if self.scale is None else self.scale
        matrix = initial_matrix(self.init, self.init_text, self.length, host, generator, scale)
        bound = self.rank**-0.5
        left = torch.empty(self.positions, self.rank).uniform_(-bound, bound, generator=generator)
        right = torch.zeros(self.rank, host.dim)
        return OffsetPrompt(matrix, left, right, scale, self.alpha * bound, self.beyond)

    def count(self, dim: int) -> int:
        """`length * dim + (positions + dim) * rank`."""
        return self.length * dim + (self.positions + dim) * self.rank
