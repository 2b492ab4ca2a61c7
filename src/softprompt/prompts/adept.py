"""ADePT: a shorter prompt, and a small network that shifts each token's own embedding."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.prompts.base import Folded, Host, PromptConfig, SoftPrompt, at_least
from softprompt.prompts.initialization import Init, check_init, check_scale, initial_matrix


@final
class AdaptivePrompt(SoftPrompt):
    """`[scale * matrix; E + scale * (ReLU(E / scale @ down + down_bias) @ up + up_bias)]`.

    Args:
        matrix: the short prompt.
        down: the network's first layer; the second and the biases start at zero.
        embedding: the host's table, which `fold` runs through the network. Not a buffer: it belongs to the
            backbone, and is neither saved nor moved with the prompt.
        scale: size of one unit of prompt, input and shift.
        dropout: dropout rate of the network's hidden layer in training; draws from torch's global generator.
    """

    scale: Tensor

    def __init__(
        self,
        matrix: Float[Tensor, "prompt dim"],
        down: Float[Tensor, "dim width"],
        embedding: Float[Tensor, "vocab dim"],
        scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        dim, width = down.shape
        self.matrix = nn.Parameter(matrix)
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(width, dim))
        self.up_bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.embedding = embedding
        self.dropout = dropout

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The short prompt in the host's units."""
        return self.scale * self.matrix

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings plus the network's output for each, computed in float32."""
        return embeds + self._network(embeds.float()).to(embeds.dtype)

    def fold(self) -> Folded:
        """The prompt, and the network's output for every token as an exact table of `vocab * dim` floats."""
        training = self.training
        self.eval()
        with torch.no_grad():
            # In chunks, so that only the table itself is allocated in full.
            parts = [self._network(part.to(self.up)) for part in torch.split(self.embedding, 8192)]
        self.train(training)
        return Folded(self.prompt().detach().clone(), input_table=torch.cat(parts))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The prompt, and the network."""
        return {"prompt": [self.matrix], "network": [self.down, self.down_bias, self.up, self.up_bias]}

    def _network(self, embeds: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        inner = nn.functional.dropout(embeds / self.scale @ self.down + self.down_bias, self.dropout, self.training)
        return self.scale * (torch.relu(inner) @ self.up + self.up_bias)


@final
@dataclass(frozen=True, kw_only=True)
class ADePT(PromptConfig):
    """`[P_s; E + ReLU(E A + a) B + b]`, `length * dim + 2 * dim * width + width + dim` parameters.

    Costs a narrow network on every input token per step; after folding, one lookup in a table as large as the
    backbone's embedding table. PEFT's prompt-tuning format cannot express it.
    Reference: Tang et al. 2025, "ADePT: Adaptive Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning"; `down`,
    `down_bias`, `up` and `up_bias` are their A, a, B and b, `width` their r.
    Differs: input, prompt and shift are all measured in units of the host's embedding RMS (`scale=1` is the
    published form); the published code's dropout of 0.1 is off unless asked; the paper's two learning rates become
    `lr` and a ratio.

    >>> ADePT(length=60, width=19).count(768)
    76051
    """

    folds: ClassVar[str] = "prompt + input table"

    length: int = 60
    """Virtual tokens in front of the input."""
    width: int = 19
    """Hidden size of the network."""
    dropout: float = 0.0
    """Dropout rate of the network's hidden layer in training."""
    network_rate: float = 0.01
    """Learning rate of the network, relative to the prompt's (published: 0.0001, prompt 0.3)."""
    init: Init = "vocab"
    """Source of the prompt's initial values."""
    init_text: str = ""
    """The text, with `init=text`."""
    scale: float | None = None
    """What 1.0 in the trained tensors means in embedding space; None: the host's embedding RMS."""

    def check(self) -> None:
        """Refuse sizes, scales and initial values that cannot work."""
        super().check()
        at_least(1, width=self.width)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        check_init(self.init, self.init_text)
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "ADePT":
        """Length 60 and width 19 with the code's dropout, and learning rates 0.3 and 0.0001."""
        return cls(length=60, width=19, dropout=0.1, network_rate=1e-4 / 0.3, scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> AdaptivePrompt:
        """Initial vectors, A ~ U(+-1/sqrt(width)) and B = a = b = 0: the shift starts at zero."""
        scale = host.rms if self.scale is None else self.scale
        matrix = initial_matrix(self.init, self.init_text, self.length, host, generator, scale)
        bound = self.width**-0.5
        down = torch.empty(host.dim, self.width).uniform_(-bound, bound, generator=generator)
        return AdaptivePrompt(matrix, down, host.embedding, scale, self.dropout)

    def count(self, dim: int) -> int:
        """`length * dim + 2 * dim * width + width + dim`."""
        return self.length * dim + 2 * dim * self.width + self.width + dim
