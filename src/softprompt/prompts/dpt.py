"""Decomposed prompt tuning: the prompt is a product of two thin matrices, or a frozen anchor plus their update."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly, at_least
from softprompt.prompts.initialization import (
    Init,
    check_init,
    check_scale,
    check_text,
    factorize,
    gradient_factors,
    initial_matrix,
    source_vectors,
    start_gradient,
)

Anchor = Literal["vocab", "text", "label_words", "none"]
"""Frozen vectors that training adds to: random `vocab` rows, those of a `text`, of the `label_words`, or `none`."""
FactorInit = Literal["random", "gradient"]
"""Where the factors start around an anchor: N(0, 1), or the singular vectors of the loss's gradient there (LoRA-GA)."""


@final
class DecomposedPrompt(PromptOnly):
    """`P = scale * left @ right`."""

    scale: Tensor

    def __init__(self, left: Float[Tensor, "prompt rank"], right: Float[Tensor, "rank dim"], scale: float) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The product in the host's units; its rank is at most that of the factors."""
        return self.scale * (self.left @ self.right)


@final
class AnchoredPrompt(PromptOnly):
    """`P = anchor + scale * (A B - A0 B0)`, where `A = A0 + left_update` and `B = B0 + right_update`.

    The updates start at zero, and then the prompt is exactly the anchor; weight decay pulls it back there. The anchor's
    vectors are saved, not the ids of its tokens: a backbone in another precision embeds those differently, which would
    change a finished prompt.
    """

    anchor: Tensor
    first_left: Tensor
    first_right: Tensor
    scale: Tensor

    def __init__(
        self,
        anchor: Float[Tensor, "prompt dim"],
        first_left: Float[Tensor, "prompt rank"],
        first_right: Float[Tensor, "rank dim"],
        scale: float,
    ) -> None:
        super().__init__()
        self.left_update = nn.Parameter(torch.zeros_like(first_left))
        self.right_update = nn.Parameter(torch.zeros_like(first_right))
        self.register_buffer("anchor", anchor)
        self.register_buffer("first_left", first_left)
        self.register_buffer("first_right", first_right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The anchor plus what was learned, whose rank is at most twice that of the factors; in the host's units."""
        # A B - A0 B0 without the difference of two large products, so that nothing is lost to rounding.
        left = self.first_left + self.left_update
        return self.anchor + self.scale * (left @ self.right_update + self.left_update @ self.first_right)


def decomposed(
    left: Float[Tensor, "prompt rank"],
    right: Float[Tensor, "rank dim"],
    unit: float,
    scale: float | None = None,
) -> DecomposedPrompt:
    """The prompt `unit * left @ right`, its factors at unit size or, with a `scale`, sharing the rest equally."""
    if scale is None:
        return DecomposedPrompt(left / _rms(left), right / _rms(right), unit * _rms(left) * _rms(right))
    share = (unit / scale) ** 0.5
    return DecomposedPrompt(left * share, right * share, scale)


@final
@dataclass(frozen=True, kw_only=True)
class DPT(PromptConfig):
    """`P = P0 + s (A B - A0 B0)`, P0 frozen, or as published `P = A B`: `rank * (length + dim)` parameters.

    Costs two thin products a step, nothing after folding; on disk an anchored prompt also keeps P0, A0 and B0, frozen.
    Training starts at exactly P0; with a warm start, P0 is the given prompt, whatever its rank. Without an anchor the
    prompt itself has rank at most `rank`; with one, `P - (P0 - s A0 B0)` does. `factor_init=gradient` computes the
    gradient of `gradient_batches` batches before the first step: count those as steps when you compare.
    Reference: Xiao et al. 2023, "Decomposed Prompt Tuning via Low-Rank Reparameterization"; `left` is their A
    and `right` their B, transposed as in their code (`[length, rank] @ [rank, dim]`).
    `factor_init=gradient`: Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation".
    Differs: theirs is `anchor=none`, where `A B` must represent the start as well as what is learned; the anchor is
    ours. A0 and B0 are N(0, 1), and `s` is such that a first step at any length and rank lowers the loss about as much
    as one of `plain` (`matched_scale`). What is trained are `A - A0` and `B - B0`, so weight decay pulls towards the
    anchor. Without an anchor both factors are kept at unit size and a constant carries the product to the host's
    embedding RMS, so that one learning rate fits every backbone; it starts from the best rank-`rank` part of vocabulary
    rows, and needs more steps than an anchored prompt (docs/results/superglue). The default length is 20, not 100:
    it is faster, and no significant loss was measured.
    `anchor=none`, `init=uniform` and `scale=1` are the published parameterization: both factors U(-0.5, 0.5), nothing
    else.

    >>> DPT(length=100, rank=10).count(768)
    8680
    """

    length: int = 20
    """Virtual tokens in front of the input."""
    rank: int = 10
    """Width of the two factors."""
    anchor: Anchor = "vocab"
    """Frozen vectors that the product is added to: random ones of the vocabulary (in a vision model sampled patches),
    the embeddings of a text, of the task's label words, or none; a warm start replaces them."""
    factor_init: FactorInit = "random"
    """Where the factors start around an anchor: standard normal, or the leading directions of the gradient."""
    gradient_batches: int = 8
    """Batches of training rows that the gradient is averaged over, with `factor_init=gradient`."""
    init: Init = "vocab"
    """Source of the initial values, with `anchor=none`; all but `uniform` by truncated SVD."""
    init_text: str = ""
    """The text, with `anchor=text` or `init=text`; repeated to the length."""
    scale: float | None = None
    """What 1.0 in the product of the factors means in embedding space; None: chosen from the host's embedding RMS."""

    def check(self) -> None:
        """Refuse a rank above the length, and a start that does not fit the anchor."""
        super().check()
        at_least(1, rank=self.rank, gradient_batches=self.gradient_batches)
        if self.rank > self.length:
            raise ValueError(
                f"rank is {self.rank} and length is {self.length}; a prompt's rank cannot exceed its length, "
                "raise the length, lower the rank, or use the method plain"
            )
        if self.anchor not in get_args(Anchor):
            raise ValueError(f"anchor is {self.anchor!r}; it must be {' or '.join(get_args(Anchor))}")
        check_scale(self.scale)
        if self.anchor == "none":
            check_init(self.init, self.init_text)
            self.check_unread("anchor 'none', where init says where the factors start", "factor_init")
            self.check_unread("anchor 'none'", "gradient_batches")
            return
        if self.factor_init not in get_args(FactorInit):
            raise ValueError(f"factor_init is {self.factor_init!r}; it must be {' or '.join(get_args(FactorInit))}")
        if self.factor_init != "gradient":
            self.check_unread(f"factor_init {self.factor_init!r}", "gradient_batches")
        if self.init != "vocab":
            raise ValueError(
                f"init is {self.init!r} and anchor {self.anchor!r}, which says where the prompt starts; leave init "
                "out, or give anchor none for a product alone"
            )
        check_text("anchor", self.anchor, self.init_text)

    @classmethod
    def published(cls) -> "DPT":
        """Length 100 and rank 10, both factors U(-0.5, 0.5): entries with standard deviation sqrt(rank) / 12."""
        return cls(length=100, rank=10, anchor="none", init="uniform", scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> DecomposedPrompt | AnchoredPrompt:
        """An anchor and factors whose update is zero; without an anchor uniform factors, or the SVD of initial vectors.

        Raises:
            ValueError: the rank exceeds the host's width, or the host has nothing that the anchor or init needs.
        """
        if self.rank > host.dim:
            raise ValueError(f"rank is {self.rank}, but the backbone's embeddings are {host.dim} wide; lower the rank")
        if self.anchor != "none":
            return self._anchored(self.anchor, host, generator)
        if self.init == "uniform" and host.start is None:
            left = torch.rand(self.length, self.rank, generator=generator) - 0.5
            right = torch.rand(self.rank, host.dim, generator=generator) - 0.5
            return DecomposedPrompt(left, right, host.rms if self.scale is None else self.scale)
        vectors = initial_matrix(self.init, self.init_text, self.length, host, generator, host.rms)
        left, right = factorize(vectors, self.rank, generator)
        return decomposed(left, right, host.rms, self.scale)

    @property
    def update_rank(self) -> int | None:
        """The rank, around an anchor: the update `A B - A0 B0` has up to twice as many directions."""
        return None if self.anchor == "none" else self.rank

    def count(self, dim: int) -> int:
        """`rank * (length + dim)`, with an anchor or without."""
        return self.rank * (self.length + dim)

    def _anchored(self, source: Init, host: Host, generator: torch.Generator) -> AnchoredPrompt:
        anchor = source_vectors(source, self.init_text, self.length, host, generator)
        if self.factor_init == "gradient":
            # These factors follow the gradient, and a first step lowers the loss as much as plain's as it is: 0.8 to
            # 1.3 times at ranks 1 and 10.
            left, right = gradient_factors(start_gradient(host, anchor, self.gradient_batches), self.rank)
            scale = host.rms / self.rank**0.5
        else:
            left = torch.randn(self.length, self.rank, generator=generator)
            right = torch.randn(self.rank, host.dim, generator=generator)
            scale = matched_scale(self.length, host.dim, self.rank, host.rms)
        return AnchoredPrompt(anchor, left, right, scale if self.scale is None else self.scale)


def matched_scale(length: int, dim: int, rank: int, unit: float) -> float:
    """The `s` at which the first step of `s A B` lowers the loss as much as that of a full prompt, at the same rate.

    Adam's first step is `lr` times the gradient's sign. To first order it lowers the loss by `lr unit sum |G|` for a
    full prompt in units of `unit`, and by `lr s (sum |A' G| + sum |G B'|)` for the factors. With A and B ~ N(0, 1) and
    a gradient G of independent entries of size g, these are `lr unit length dim g` and
    `lr s rank (dim sqrt(length) + length sqrt(dim)) g`, each up to the same constant.

    >>> round(matched_scale(100, 576, 10, 1.0), 3)
    0.706
    """
    return unit * (length * dim) ** 0.5 / (rank * (length**0.5 + dim**0.5))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
