"""Bilinear prompt tuning: a prompt times a matrix that whitens the input, or times a learned one."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host, PromptConfig, PromptOnly, at_least
from softprompt.prompts.initialization import check_scale, factorize, start_gradient, warm_start

Mode = Literal["bilinear", "frozen", "tuned"]
"""The second factor: `bilinear` a thin learned one; a whitening matrix, `frozen` or `tuned` with the first."""
Through = Literal["attention", "inputs"]
"""What is whitened: the input vectors after the layer's query and key weights, or the input vectors themselves."""
RightInit = Literal["uniform", "whitening", "gradient"]
"""Initial values of a bilinear second factor: uniform (Xavier), random columns of the whitening matrix, or the leading
directions of the gradient at random input vectors."""


@final
class BilinearPrompt(PromptOnly):
    """`P = scale * left @ right`; `right` is trained, or a frozen whitening matrix."""

    scale: Tensor
    right: Tensor

    def __init__(
        self,
        left: Float[Tensor, "prompt inner"],
        right: Float[Tensor, "inner dim"],
        scale: float,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(left)
        if frozen:
            # Saved although frozen: another sample would give another whitening.
            self.register_buffer("right", right)
        else:
            self.right = nn.Parameter(right)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The product in the host's units."""
        return self.scale * (self.left @ self.right)


@final
@dataclass(frozen=True, kw_only=True)
class BPT(PromptConfig):
    """`P = A B^T`, `(length + dim) * rank` parameters; or `P = P0 W^T` with `W` whitening `W_q W_k^T x` of the inputs.

    Whitening costs one eigendecomposition of a `dim * dim` matrix when the prompt is built, and `dim * dim` numbers
    on disk; folded it costs nothing. With a `scale` the factors start as published, times that scale; without one,
    both are at unit size and the first prompt is at the host's embedding RMS, so that one learning rate fits every
    backbone. In a deep prompt each layer has its own factors, whitened by that layer's own inputs and weights.
    Reference: Wang, Duan and Kong 2025, "Attention to the Burstiness in Visual Prompt Tuning!"; `left` is their A or
    P0, `right` their B^T or W^T, `rank` their p. `W = (Sigma + eps I)^(-1/2)` is symmetric (ZCA), and Sigma is not
    centered, as theirs is not.
    Differs: the published code has no eps, so it divides by zero on a rank-deficient sample; it averages the images
    before Sigma, which leaves one vector per position; its shallow form uses the query weights in place of the key
    weights; its prompts must fill a square grid; it also divides Sigma by `dim`; of a deep prompt it trains B in the
    top four blocks only (183,600 parameters at length and rank 50), this one in all. Apart from these differences,
    `scale=1` is the published form.

    >>> BPT(length=100, rank=75).count(768)
    65100
    """

    rank: int = 75
    """Width of the two factors, with `mode=bilinear` only; may exceed the length."""
    mode: Mode = "bilinear"
    """What the second factor is."""
    init: RightInit = "uniform"
    """Initial values of the second factor, with `mode=bilinear`."""
    through: Through = "attention"
    """What is whitened: input vectors after the layer's query and key weights, or the input vectors themselves. Used,
    like `samples` and `eps`, only with `mode=frozen`, `mode=tuned` or `init=whitening`."""
    samples: int = 4096
    """Input vectors that the whitening matrix is computed from."""
    gradient_batches: int = 8
    """Batches of training rows that the gradient is averaged over, with `init=gradient`; count them as steps."""
    eps: float = 1e-3
    """Added to the variances that are whitened, in units of their mean."""
    scale: float | None = None
    """What 1.0 in the product of the factors means in embedding space; None: chosen from the host's embedding RMS."""

    def check(self) -> None:
        """Refuse sizes, modes and scales that cannot work."""
        super().check()
        at_least(1, rank=self.rank, samples=self.samples, gradient_batches=self.gradient_batches)
        if self.mode not in ("bilinear", "frozen", "tuned"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'bilinear', 'frozen' or 'tuned'")
        if not 0 < self.eps < float("inf"):
            raise ValueError(
                f"eps is {self.eps}; it must be a positive number, or a rank-deficient sample has no whitening"
            )
        for name, kinds in (("init", RightInit), ("through", Through)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(get_args(kinds))}")
        if self.mode != "bilinear":
            self.check_unread(f"mode {self.mode!r}, which always whitens", "init", "rank", "gradient_batches")
        elif self.init != "whitening":
            self.check_unread(f"mode 'bilinear' and init {self.init!r}", "through", "samples", "eps")
        if self.init != "gradient":
            self.check_unread(f"init {self.init!r}", "gradient_batches")
        if self.init == "gradient" and self.rank > self.length:
            raise ValueError(
                f"rank is {self.rank} and length is {self.length}; a gradient has no more directions than the "
                "prompt is long; raise the length, lower the rank, or use init uniform"
            )
        check_scale(self.scale)

    @classmethod
    def published(cls) -> "BPT":
        """Length 100 and rank 75, A ~ N(0, 0.02) and B Xavier uniform."""
        return cls(length=100, rank=75, scale=1.0)

    def build(self, host: Host, generator: torch.Generator) -> BilinearPrompt:
        """A normal first factor and a uniform or whitening second one; or the product nearest to a warm start.

        Raises:
            ValueError: a warm start together with an `init`, or the host lacks what the second factor is made from.
        """
        if host.start is not None and self.mode == "bilinear":
            if self.init != "uniform":
                raise ValueError(
                    f"init is {self.init!r}, but the prompt is to start from another prompt; leave out one of the two "
                    "(init, init_prompt)"
                )
            scale = host.rms if self.scale is None else self.scale
            return BilinearPrompt(*factorize(warm_start(host, self.length) / scale, self.rank, generator), scale)
        inner = self.rank if self.mode == "bilinear" else host.dim
        left = torch.randn(self.length, inner, generator=generator)
        right = self._right(inner, host, generator)
        frozen = self.mode == "frozen"
        if self.scale is None:
            # Unit entries on both sides sum over `inner` products to a prompt of size sqrt(inner).
            right, scale = right / right.square().mean().sqrt(), host.rms / inner**0.5
        else:
            left, scale = 0.02 * left, self.scale
        if host.start is not None:  # whitened: solve for the factor that gives the start
            start = warm_start(host, self.length) / scale
            left = torch.linalg.solve(right.double().T, start.double().T).T.float().contiguous()
        return BilinearPrompt(left, right, scale, frozen)

    def _right(self, inner: int, host: Host, generator: torch.Generator) -> Float[Tensor, "inner dim"]:
        """The second factor's initial values; raises where the host lacks what they are computed from."""
        if self.mode == "bilinear" and self.init == "uniform":
            bound = (6 / (inner + host.dim)) ** 0.5
            return torch.empty(inner, host.dim).uniform_(-bound, bound, generator=generator)
        if self.mode == "bilinear" and self.init == "gradient":
            if inner > host.dim:
                raise ValueError(
                    f"rank is {inner}, but a gradient as wide as the backbone has {host.dim} directions; lower the rank"
                )
            at = host.sample(self.length, generator)
            directions = torch.linalg.svd(start_gradient(host, at, self.gradient_batches).double(), full_matrices=False)
            # The size of the uniform start, whose entries have a variance of 2 / (inner + dim).
            return (directions[2][:inner] * (2 * host.dim / (inner + host.dim)) ** 0.5).float().contiguous()
        inputs = host.sample(self.samples, generator)
        if self.through == "attention":
            if host.query_key is None:
                raise ValueError("this host has no query and key weights to whiten with; set through to 'inputs'")
            product = host.query_key()
            if product.shape[1] != host.dim:
                raise ValueError(
                    f"the input vectors are {host.dim} wide and the first layer's {product.shape[1]}, since this model "
                    "projects in between; set through to 'inputs'"
                )
            inputs = inputs @ product.T
        matrix = whitening(inputs, self.eps).T
        if self.mode != "bilinear":
            return matrix.contiguous()
        columns = torch.randperm(host.dim, generator=generator)
        return matrix[columns.repeat(-(-inner // host.dim))[:inner]].contiguous()

    def count(self, dim: int) -> int:
        """`(length + dim) * rank`; whitened `length * dim`, and `dim * dim` more if that is tuned."""
        if self.mode == "bilinear":
            return (self.length + dim) * self.rank
        return self.length * dim + (dim * dim if self.mode == "tuned" else 0)


def whitening(inputs: Float[Tensor, "sample dim"], eps: float) -> Float[Tensor, "dim dim"]:
    """`(Sigma + eps * mean eigenvalue * I)^(-1/2)` of the second moment `Sigma = X^T X / n`; symmetric.

    Raises:
        ValueError: every input is zero.
    """
    moment = inputs.double().T @ inputs.double() / inputs.shape[0]
    floor = eps * moment.diagonal().mean()
    if not floor > 0:
        raise ValueError("every sampled input vector is zero, which cannot be whitened; use mode 'bilinear'")
    values, vectors = torch.linalg.eigh(moment)
    # Rounding leaves the empty directions slightly negative.
    return ((vectors * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T).float()
