"""Initial values of prompts, by their source, in units of the host's embedding RMS."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.prompts.base import Host

Init = Literal["vocab", "uniform", "text", "label_words"]
"""`vocab`: embeddings of random tokens; `text`: of a text; `label_words`: of the answers; `uniform`: U(-0.5, 0.5)."""


def source_vectors(
    init: Init, text: str, length: int, host: Host, generator: torch.Generator
) -> Float[Tensor, "length dim"]:
    """The warm start, or `length` of the host's embeddings, unscaled; raises as `initial_matrix`."""
    if host.start is not None:
        if init in ("text", "label_words"):
            raise ValueError(
                f"the prompt is to start from another prompt and from {init!r}; leave out one of the two (init_prompt, "
                "or the setting with this value)"
            )
        return warm_start(host, length)
    if init == "vocab":
        return host.sample(length, generator)
    if init == "text":
        return host.embed(text, length)
    if init != "label_words":
        raise ValueError(f"init is {init!r}, which is not a source of embeddings; use 'vocab', 'text' or 'label_words'")
    if not host.label_words:
        raise ValueError(
            "the prompt is to start from the task's label words, but the task has none; use 'vocab' or 'text'"
        )
    return host.embed("".join(host.label_words), length)


def initial_matrix(
    init: Init, text: str, length: int, host: Host, generator: torch.Generator, scale: float
) -> Float[Tensor, "length dim"]:
    """`length` starting vectors in units of `scale`; `uniform` is U(-0.5, 0.5) of them, whatever the scale.

    Raises:
        ValueError: `text` without a text, a text with `init` other than `text`, `label_words` for a task without
            any, or a warm start of another length or beside one of these two.
    """
    check_init(init, text)
    if init == "uniform" and host.start is None:
        return torch.rand(length, host.dim, generator=generator) - 0.5
    return source_vectors(init, text, length, host, generator) / scale


def warm_start(host: Host, length: int) -> Float[Tensor, "length dim"]:
    """The host's warm start, unscaled.

    Raises:
        ValueError: it has another shape than the prompt.
    """
    if host.start is None or host.start.shape != (length, host.dim):
        shape = None if host.start is None else tuple(host.start.shape)
        raise ValueError(
            f"the prompt to start from is {shape} and the new one {(length, host.dim)}; "
            "give it the same length, and the backbone it was trained on"
        )
    return host.start.float().clone()


def start_gradient(host: Host, prompt: Float[Tensor, "length dim"], batches: int) -> Float[Tensor, "length dim"]:
    """The mean gradient of the loss at `prompt`, over `batches` batches of training rows.

    Raises:
        ValueError: the host has no training rows to compute it from, or it is zero or not finite.
    """
    if host.gradient is None:
        raise ValueError(
            "gradient initialization needs a shallow prompt about to be trained on a task's rows; choose another "
            "initialization"
        )
    gradient = host.gradient(prompt, batches)
    finite = bool(gradient.isfinite().all())
    if not finite or not bool(gradient.any()):
        raise ValueError(
            f"the gradient at the start, over {batches} batches, is {'zero' if finite else 'NaN'}, so it gives no "
            "direction to start in; choose another start"
        )
    return gradient


def gradient_factors(
    gradient: Float[Tensor, "length dim"], rank: int
) -> tuple[Float[Tensor, "length rank"], Float[Tensor, "rank dim"]]:
    """Factors at unit size whose first step follows the gradient: `A0 = U[:, r:2r]`, `B0 = V[:, :r]^T`.

    Where the gradient has fewer than `2 * rank` directions, A0 takes the last `rank` of them.

    Reference: Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", theorem 3.1.
    """
    length, dim = gradient.shape
    left, _, right = torch.linalg.svd(gradient.detach().double().cpu(), full_matrices=False)
    last = min(2 * rank, left.shape[1])
    return (
        (left[:, last - rank : last] * length**0.5).float().contiguous(),
        (right[:rank] * dim**0.5).float().contiguous(),
    )


def check_init(init: Init, text: str) -> None:
    """Refuse a text without `init='text'`, and the other way round."""
    check_text("init", init, text)


def check_text(name: str, value: str, text: str) -> None:
    """Refuse a text where the setting `name` is not `text`, and the other way round."""
    if (value == "text") != bool(text):
        raise ValueError(
            f"{name} is {value!r} and init_text is {text!r}; a text goes with {name} 'text', and only with it"
        )


def factorize(
    matrix: Float[Tensor, "length dim"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "length rank"], Float[Tensor, "rank dim"]]:
    """The best rank-`rank` product for `matrix` (truncated SVD), its singular values shared evenly by both factors.

    Directions that `matrix` lacks (because text was repeated, or the rank exceeds the length) start as small noise in
    the first factor and zeros in the second: they are trainable and leave the product as it is.

    Reference: Eckart and Young, 1936.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    if (spare := rank - len(values)) > 0:  # more directions than rows or columns
        values = nn.functional.pad(values, (0, spare))
        left, right = nn.functional.pad(left, (0, spare)), nn.functional.pad(right, (0, 0, 0, spare))
    root = values[:rank].sqrt()
    left, right = left[:, :rank] * root, root[:, None] * right[:rank]
    missing = values[:rank] <= values[0] * 1e-6
    if missing.any():
        noise, length = 0.1 * float(values[0].sqrt()), len(matrix)
        draws = torch.randn(length, int(missing.sum()), generator=generator).double()
        left[:, missing], right[missing] = noise * draws / length**0.5, 0
    return left.float().contiguous(), right.float().contiguous()


def check_scale(scale: float | None) -> None:
    """Refuse a scale that is not a positive number."""
    if scale is not None and not scale > 0:
        raise ValueError(f"scale is {scale}; it must be a positive number, or None for the host's embedding RMS")
